"""The plan of a run: what was left open, chosen for the images, the student and the machine, with what it will cost.

``make_plan`` is what ``train_student`` begins with; the command line prints it. Where both the epochs and the batch are given,
or a preset gives them, the run is planned already: the rest is as published, and only its cost is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, NamedTuple

import torch

from ..common.errors import MisuseError
from ..common.images.beton import Beton
from ..common.ranks import ALONE, Ranks, from_main
from ..common.run import choose_precision, pick_device
from ..common.views.config import LoaderConfig
from .begun import as_begun, read_begun
from .config import PUBLISHED_LR, ObjectiveConfig, PairingChoice, PairingConfig
from .objectives import OBJECTIVES
from .optimiser import LR_BATCH_SIZE
from .plan_warnings import LEAST_RATE, LEAST_STEPS, stride_of, warnings_of
from .students import SMALL_IMAGE_FAMILIES, SMALL_SIDE, VIT_FAMILIES, is_small, model_family, with_usual_patch_drop
from .targets.branch import RunContext, TargetBranch
from .targets.pairing import check_pairing, choose_pairing
from .train_config import USUAL_BATCH, LoaderByPlan, TrainConfig, seconds_of
from .trial import Trial, free_memory, try_steps


class Effort(NamedTuple):
    """The longest time in seconds, the steps that are enough, and the fewest passes over the images."""

    seconds: float | None
    steps: int
    epochs: int
    words: str


EFFORTS = {
    "minutes": Effort(15 * 60, 4_000, 1, "at most 15 minutes"),
    "hours": Effort(4 * 3600, 40_000, 10, "at most 4 hours"),
    "full": Effort(None, 100_000, 100, "100 epochs or more"),
}
SMALLEST_BATCH, CPU_BATCH, FEWEST = 32, 32, 16
NEED_A_BATCH = ("swav", "msn")
"""Objectives whose targets are balanced over the batch."""
STEPS_AN_EPOCH = 32
"""That a batch should leave: a small data set is for small batches."""
BY_SIZE = f"for --image-size up to {SMALL_SIDE}; --no-small-images keeps timm's"
WORTH_A_STEM = 2.0
"""Times as many steps in the same time, for which the form for small images is given up."""
WORTH_MEASURING = 50
"""Steps of a run: a shorter one is over before its length is known."""
LEAST_WARMUP_STEPS = 50


class Choice(NamedTuple):
    """What was chosen of a setting, and why."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class TrainPlan:
    """``config`` leaves nothing open. ``trial`` None: no step was tried. Bytes and seconds are of this machine."""

    config: TrainConfig
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]
    num_images: int
    steps_per_epoch: int
    trial: Trial | None
    free_bytes: int | None

    @property
    def steps(self) -> int:
        assert self.config.epochs is not None
        return self.steps_per_epoch * self.config.epochs

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return self.trial and self.trial.seconds * self.steps

    @property
    def views(self) -> str:
        """Of an image in a step, in words."""
        pairing, size = self.config.pairing, self.config.student.image_size
        assert isinstance(pairing, PairingConfig)
        local = f" and {pairing.num_local} smaller ones" if pairing.num_local else ""
        return f"{pairing.num_global} of {size} px{local}"


def make_plan(config: TrainConfig) -> TrainPlan:
    """The plan of ``config``, as ``train_student`` would follow it. MisuseError as there."""
    device = pick_device(config.device)
    config = replace(config, precision=choose_precision(device, config.precision))
    return plan_run(*opened(config, device), measured=True)


def opened(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, RunContext, TargetBranch]:
    """The targets of ``config``, which then names its objective: the usual one of such targets, where none was asked for."""
    run = RunContext(Beton(config.data), device, config.precision, config.seed, config.objective)
    branch = config.targets.open(run)
    objective = config.objective or ObjectiveConfig(branch.usual_objective)
    return replace(config, objective=objective), replace(run, objective=objective), branch


def plan_run(
    config: TrainConfig,
    run: RunContext,
    branch: TargetBranch,
    ranks: Ranks = ALONE,
    measured: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> TrainPlan:
    """``make_plan`` for a run that is open already, whose ``config`` names its objective.

    ``measured``: a step is tried even where nothing hangs on it. ``say`` is told what is tried, which may take a while.
    """
    begun = from_main(lambda: read_begun(config.out))
    if begun is not None:
        config = as_begun(config, begun)
    assert isinstance(config.objective, ObjectiveConfig)
    share = OBJECTIVES[config.objective.name].patch_drop
    config = replace(config, student=with_usual_patch_drop(config.student, share))
    planner = Planner(config, run, branch, ranks, say)
    if not isinstance(config.loader, LoaderByPlan) and run.data.num_images < config.loader.batch_size:
        raise MisuseError(
            f"`batch_size` {config.loader.batch_size} is more than the {run.data.num_images} images of {run.data.path}"
        )
    if config.epochs is None or isinstance(config.loader, LoaderByPlan):
        planner.choose()
    else:
        planner.as_published()
    return planner.plan(measured)


class Planner:
    """Fills in what a configuration leaves open, one setting after the other."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunContext,
        branch: TargetBranch,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.run, self.branch, self.ranks, self.say = config, run, branch, ranks, say
        self.choices: list[Choice] = []
        self.trial: Trial | None = None
        self.on_cpu = run.device.type == "cpu"
        self.family = model_family(config.student.name)

    # ==== as published ====

    def as_published(self) -> None:
        """What is open although epochs and batch are given."""
        optimiser = replace(self.config.optimiser, lr=self.config.optimiser.peak)
        small = is_small(self.config.student)
        if small and self.config.student.small_images is None:
            self.choices.append(Choice("small_images", True, BY_SIZE))
        student = replace(self.config.student, small_images=small)
        self._set(optimiser=optimiser, student=student, pairing=self._pairing(None))

    def _pairing(self, num_local: int | None) -> PairingConfig:
        """What is open of the views; of local crops as many as ``num_local``, None: as the recipe has them."""
        config, branch = self.config, self.branch
        objective = config.objective
        assert objective is not None
        if isinstance(config.pairing, PairingConfig):
            return check_pairing(objective.name, config.pairing)
        choice = config.pairing or PairingChoice()
        if choice.num_local is None and num_local is not None:
            choice = replace(choice, num_local=num_local)
        return choose_pairing(objective.name, branch.recipe, branch.views, choice, branch.from_student)

    # ==== chosen ====

    def choose(self) -> None:
        """Views, batch and rate first, on which the time of a step depends; then the stem and the epochs, by that time."""
        self._choose_views()
        self._choose_batch()
        self._choose_rate()
        self._choose_length()

    def _choose_views(self) -> None:
        usual = self._pairing(None)
        config = self.config
        left_open = not isinstance(config.pairing, PairingConfig) and (
            config.pairing is None or config.pairing.num_local is None
        )
        reason = ""
        if left_open and usual.num_local and config.local_size is None and usual.global_weight is None:
            local = self.branch.recipe.local_crop
            assert local is not None
            side = config.student.image_size * local.size // self.branch.recipe.global_crops[0].size
            if self.on_cpu:
                reason = f"{usual.num_local} would cost as much again, on a CPU"
            elif side < 2 * self.stride:
                reason = f"{side} px leave less than 2 x 2 positions of a network that reduces {self.stride}-fold"
        if reason and not self.branch.from_student:
            self.choices.append(Choice("num_local", 0, reason))
            usual = self._pairing(0)
        self._set(pairing=usual)

    def _choose_batch(self) -> None:
        loader, images = self.config.loader, self.run.data.num_images
        if not isinstance(loader, LoaderByPlan):
            return
        most = CPU_BATCH if self.on_cpu else USUAL_BATCH
        batch = power_of_two(min(most, max(SMALLEST_BATCH, images // STEPS_AN_EPOCH)))
        step = self.ranks.world_size * (self.config.accumulate or 1)
        batch = min(batch, max(2, images)) // step * step or step
        reason = f"{images:,} images leave {images // batch:,} steps an epoch"
        if batch == most:
            reason += ", more would leave fewer steps for the time" if self.on_cpu else ", as published"
        self.choices.append(Choice("batch_size", batch, reason))
        self._set(loader=LoaderConfig(loader.backend, batch, loader.workers))

    def _choose_rate(self) -> None:
        optimiser, batch = self.config.optimiser, self.config.loader.batch_size
        if optimiser.lr is not None:
            return
        scaled = PUBLISHED_LR * batch / LR_BATCH_SIZE
        least = LEAST_RATE["vit" if self.family in VIT_FAMILIES else "cnn"] if optimiser.name == "adamw" else 0.0
        lr = max(scaled, least) * LR_BATCH_SIZE / batch
        reason = f"x {batch}/{LR_BATCH_SIZE} = {max(scaled, least):g} in a step"
        if least > scaled:
            reason += f"; the published {PUBLISHED_LR:g} would be {scaled:.2g}, too little for a short run"
        self.choices.append(Choice("lr", round(lr, 6), reason))
        self._set(optimiser=replace(optimiser, lr=round(lr, 6)))

    def _choose_length(self) -> None:
        """The stem, and how many epochs."""
        config = self.config
        name = config.effort or ("minutes" if self.on_cpu else "hours")
        effort, budget = EFFORTS[name], seconds_of(config.budget)
        seconds = budget or effort.seconds
        small, stem_is_open = is_small(config.student), config.student.small_images is None
        self._set(student=replace(config.student, small_images=small))
        if self.ranks.world_size == 1:
            self._try()
        if config.epochs is None and seconds and self.trial:
            self._halve_batch(seconds, effort.steps)
        if stem_is_open and small and self.family in SMALL_IMAGE_FAMILIES:
            reason = BY_SIZE
            if self.trial and seconds and config.epochs is None and seconds / self.trial.seconds < 2 * LEAST_STEPS:
                slow = self.trial
                self._set(student=replace(config.student, small_images=False))
                self._try()
                gain = slow.seconds / self.trial.seconds
                if gain >= WORTH_A_STEM:
                    reason = f"{gain:.0f} times as many steps in the time as with a stem for small images"
                else:
                    self._set(student=replace(config.student, small_images=True))
                    self.trial = slow
            self.choices.append(Choice("small_images", self.config.student.small_images, reason))
        if config.epochs is not None:
            return
        per_epoch = self.steps_per_epoch
        wanted = max(effort.epochs, ceil(effort.steps / per_epoch))
        reason = f"{wanted * per_epoch:,} steps are enough for --effort {name} ({effort.words})"
        if seconds and self.trial:
            possible = max(1, int(seconds / (self.trial.seconds * per_epoch)))
            least = ceil(LEAST_STEPS / per_epoch)
            if budget:
                wanted, reason = (
                    possible,
                    f"{possible * per_epoch:,} steps are what --budget {config.budget} has time for",
                )
            elif possible < least:
                wanted, reason = (
                    least,
                    f"{least * per_epoch:,} steps, with fewer a student learns too little; --budget is obeyed",
                )
            elif possible < wanted:
                wanted, reason = possible, f"{possible * per_epoch:,} steps are what --effort {name} has time for"
        elif budget:
            raise MisuseError(
                "`budget` is for a single process, whose steps can be tried: give `epochs` under torchrun"
            )
        self.choices.append(Choice("epochs", wanted, reason))
        self._set(epochs=wanted, effort=None, budget=None)
        self._choose_warmup(wanted)

    def _halve_batch(self, seconds: float, enough: int) -> None:
        """Where the time is short, steps are worth more than the images in them: of as many images seen, 250 steps of 64 ended
        below the random start, 510 of 32 at 54 % and 1,030 of 16 at 64 % (MobileNetV3-Small, signdigits)."""
        objective, loader, trial = self.config.objective, self.config.loader, self.trial
        assert objective is not None and trial is not None
        chosen = {choice.setting: number for number, choice in enumerate(self.choices)}
        mine = "batch_size" in chosen and loader.batch_size > FEWEST and objective.name not in NEED_A_BATCH
        if not mine or seconds / trial.seconds >= enough or self.config.accumulate:
            return
        lr = self.config.optimiser.peak * loader.batch_size / FEWEST if "lr" in chosen else self.config.optimiser.lr
        self.trial = replace(trial, seconds=trial.seconds * FEWEST / loader.batch_size)
        self.choices[chosen["batch_size"]] = Choice(
            "batch_size", FEWEST, "the time is short, and more steps count for more"
        )
        if "lr" in chosen and lr is not None:
            lr = round(lr, 6)
            self.choices[chosen["lr"]] = Choice(
                "lr", lr, f"x {FEWEST}/{LR_BATCH_SIZE} = {lr * FEWEST / LR_BATCH_SIZE:g} in a step"
            )
        self._set(loader=replace(loader, batch_size=FEWEST), optimiser=replace(self.config.optimiser, lr=lr))

    def _choose_warmup(self, epochs: int) -> None:
        optimiser = self.config.optimiser
        if optimiser.warmup_epochs is not None:
            return
        usual = optimiser.warmup(epochs)
        least = min(LEAST_WARMUP_STEPS / self.steps_per_epoch, epochs / 4)
        if least > usual:
            self.choices.append(
                Choice("warmup_epochs", round(least, 2), f"a tenth, but {LEAST_WARMUP_STEPS} steps at least")
            )
            self._set(optimiser=replace(optimiser, warmup_epochs=round(least, 2)))

    # ==== what it is chosen by ====

    def _set(self, **values: Any) -> None:
        self.config = replace(self.config, **values)

    def _try(self) -> None:
        student = self.config.student
        self.say(f"trying steps of {student.name}")
        # a budget and epochs exclude each other, and the trial has epochs of its own
        self.trial = try_steps(replace(self.config, effort=None, budget=None), self.run)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.run.data.num_images // self.config.loader.batch_size)

    @property
    def stride(self) -> int:
        return stride_of(self.family, is_small(self.config.student))

    def plan(self, measured: bool) -> TrainPlan:
        """What was found, and what there is to warn of."""
        config = self.config
        assert config.epochs is not None
        worth_it = measured and self.steps_per_epoch * config.epochs >= WORTH_MEASURING
        if worth_it and self.trial is None and self.ranks.world_size == 1:
            self._try()
        free = free_memory(self.run.device)
        steps = self.steps_per_epoch * config.epochs
        warnings = warnings_of(
            config, steps, self.trial, free, self.branch, self.stride, self.run.data.manifest.classes
        )
        images = self.run.data.num_images
        return TrainPlan(config, tuple(self.choices), tuple(warnings), images, self.steps_per_epoch, self.trial, free)


def power_of_two(most: int) -> int:
    """The largest up to ``most``."""
    return 1 << (most.bit_length() - 1)
