"""What a run leaves open, chosen one setting after the other: by its images, and by steps that are tried on this machine."""

import time
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

from ..common.errors import MisuseError
from ..common.ranks import Ranks
from ..common.run import choose_precision, has_bfloat16
from ..common.views.config import LoaderConfig
from .config import PUBLISHED_LR, PairingChoice, PairingConfig
from .objectives import OBJECTIVES
from .optimiser import LR_BATCH_SIZE
from .plan_warnings import LEAST_RATE, LEAST_STEPS
from .students import (
    MOBILE_FAMILIES,
    OWN,
    SMALL_IMAGE_FAMILIES,
    SMALL_SIDE,
    VIT_FAMILIES,
    is_small,
    model_family,
    stride_of,
)
from .targets.branch import RunContext, TargetBranch
from .targets.pairing import check_pairing, choose_pairing
from .train_config import USUAL_BATCH, LoaderByPlan, TrainConfig, seconds_of
from .trial import Trial, try_steps


class Effort(NamedTuple):
    """The longest time in seconds, the steps that are enough, and the fewest passes over the images."""

    seconds: float | None
    steps: int
    epochs: int
    words: str


EFFORTS = {
    "minutes": Effort(15 * 60, 10_000, 1, "at most 15 minutes"),
    "hours": Effort(4 * 3600, 40_000, 10, "at most 4 hours"),
    "full": Effort(None, 100_000, 100, "100 epochs or more"),
}
SMALLEST_BATCH, CPU_BATCH, FEWEST = 32, 32, 16
NEED_A_BATCH = ("swav", "msn")
"""Objectives whose targets are balanced over the batch."""
VIEW_BY_VIEW = ("embedding", "patch")
"""Objectives in which each view has its own target and meets no other. One view of an image in a step, in twice the steps, left a
MobileNetV2 3.4 points of k-NN above two, a ViT of 0.3 M weights 5.3, and a ResNet-18 0 to 2 (benchmarks)."""
STEPS_AN_EPOCH = 32
"""That a batch should leave: a small data set is for small batches."""
BY_SIZE = f"for --image-size up to {SMALL_SIDE}; --no-small-images keeps timm's"
BY_CONVOLUTIONS = "with it a ViT learns more in a short run, and bears a higher rate; timm alone loads it without"
HIDES_PATCHES = ("ibot",)
"""Objectives that hide patches from the student: a convolution would have seen their margins."""
STEPS_FOR_A_STEM, WORTH_A_STEM = 2_000, 2.0
"""The form for small images is given up where there is time for fewer steps, and timm's makes so many times as many of it. In ten
minutes 2,600 steps of it left a MobileNetV2-0.5 ahead of 5,200 of timm's, but 1,200 a ResNet-18 behind 2,057 (benchmarks)."""
WORTH_HALVING = 1.4
"""Times as many steps in the same time, for which a batch is halved, once or again: a small network takes nearly as long
for half of it."""
WORTH_BFLOAT16 = 1.25
"""Times as many steps in the same time, for which a CPU computes in bfloat16: ResNets' are 1.5 to 2 times as many, those of
MobileNets and small ViTs fewer."""
SECONDS_TO_CHOOSE = 2.0
SHARE_TO_TRY, MOST_TO_TRY = 0.02, 10.0
"""Of the time of a run, and at most in seconds: how long its steps are tried once it is settled what they are."""
LEAST_WARMUP_STEPS = 50


class Choice(NamedTuple):
    """What was chosen of a setting, and why."""

    setting: str
    value: Any
    reason: str


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
        self.config = replace(config, precision=choose_precision(run.device, config.precision))
        self.run, self.branch, self.ranks, self.say = run, branch, ranks, say
        self.choices: list[Choice] = []
        self.trial: Trial | None = None
        self.tuned = False
        self.may_see_one = False
        self.began = time.monotonic()
        self.on_cpu = run.device.type == "cpu"
        self.family = model_family(config.student.name)
        of_store = branch.kind == "cached" and not branch.space.has_copy  # no other network passes in a step
        self.may_take_bfloat16 = (
            config.precision == "auto" and of_store and self.family != OWN and has_bfloat16(run.device)
        )

    def choose_head(self) -> None:
        """Of a run that is new: one that goes on has the head that it has."""
        objective = self.config.objective
        assert objective is not None
        without = self.family in VIT_FAMILIES and not OBJECTIVES[objective.name].norm_in_vits
        if without and objective.head_norm is None and not objective.norm_by_size:  # which is that BatchNorm's
            self.choices.append(Choice("head_norm", False, "a ViT's head has no BatchNorm, as DINO's and RoB's"))
            self._set(objective=replace(objective, head_norm=False))

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
        self._choose_conv_stem()
        self._choose_rate()
        self._choose_length()

    def _choose_views(self) -> None:
        usual = self._pairing(None)
        config = self.config
        left_open = not isinstance(config.pairing, PairingConfig) and (
            config.pairing is None or config.pairing.num_local is None
        )
        open_targets = config.pairing is None or config.pairing.step_targets is None
        of_two = (usual.pairing, usual.num_global, usual.num_local) == ("same", 2, 0)
        assert config.objective is not None
        self.may_see_one = open_targets and of_two and config.objective.name in VIEW_BY_VIEW
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
        if batch > images:
            parts = f" and `accumulate` {self.config.accumulate}" if self.config.accumulate else ""
            raise MisuseError(
                f"{self.run.data.path} has {images} images, and a step takes {batch} of them at least{parts}"
            )
        reason = f"{images:,} images leave {images // batch:,} steps an epoch"
        if batch == most:
            reason += ", more would leave fewer steps for the time" if self.on_cpu else ", as published"
        self.choices.append(Choice("batch_size", batch, reason))
        self._set(loader=LoaderConfig(loader.backend, batch, loader.workers))

    def _choose_conv_stem(self) -> None:
        student = self.config.student
        assert self.config.objective is not None
        open_vit = student.conv_stem is None and self.family in VIT_FAMILIES and is_small(student)
        if open_vit and student.init is None and self.config.objective.name not in HIDES_PATCHES:
            self.choices.append(Choice("conv_stem", True, BY_CONVOLUTIONS))
            self._set(student=replace(student, conv_stem=True))

    def _choose_rate(self) -> None:
        optimiser, batch = self.config.optimiser, self.config.loader.batch_size
        if optimiser.lr is not None:
            return
        scaled = PUBLISHED_LR * batch / LR_BATCH_SIZE
        kind = "vit" if self.family in VIT_FAMILIES else "mobile" if self.family in MOBILE_FAMILIES else "cnn"
        if self.config.student.conv_stem and batch <= CPU_BATCH:  # with larger ones it was not tried
            kind = "vit-conv"
        least = LEAST_RATE[kind] if optimiser.name == "adamw" else 0.0
        lr = max(scaled, least) * LR_BATCH_SIZE / batch
        reason = f"x {batch}/{LR_BATCH_SIZE} = {max(scaled, least):g} in a step"
        if least > scaled:
            reason += f"; the published {PUBLISHED_LR:g} would be {scaled:.2g}, too little for a short run"
        self.choices.append(Choice("lr", round(lr, 6), reason))
        self._set(optimiser=replace(optimiser, lr=round(lr, 6)))

    def _choose_length(self) -> None:
        """The stem, a smaller batch where that buys steps, and how many epochs."""
        config, device_has = self.config, "minutes" if self.on_cpu else "hours"
        effort, budget = EFFORTS[config.effort or device_has], seconds_of(config.budget)
        seconds = budget or effort.seconds
        self._set(student=replace(config.student, small_images=is_small(config.student)))
        if self.ranks.world_size == 1:
            self._try(SECONDS_TO_CHOOSE)
        elif budget:
            raise MisuseError(
                "`budget` is for a single process, whose steps can be tried: give `epochs` under torchrun"
            )
        short = seconds if config.epochs is None else None
        if short:
            self._choose_precision(short, effort.steps)
        if config.student.small_images is None:
            self._choose_stem(short)
        if short:
            self._halve_batch(short, effort.steps)
            self._choose_one_view(short, effort.steps)
        if config.epochs is None:
            self._choose_epochs(config.effort or device_has, seconds)

    def _choose_stem(self, seconds: float | None) -> None:
        """timm's stem in the place of that for small images, where the time would be too short with it."""
        student, halves = self.config.student, 2 if self._may_halve else 1
        if not student.small_images or self.family not in SMALL_IMAGE_FAMILIES:
            return
        reason = BY_SIZE
        asked = student.conv_stem and not self._chosen("conv_stem")
        short = seconds and not asked and self._has_fewer(STEPS_FOR_A_STEM, halves * seconds)
        plain = replace(student, small_images=False, conv_stem=None)
        if short and (gain := self._gain(WORTH_A_STEM, student=plain)):
            reason = f"{gain:.0f} times as many steps in the time as with a stem for small images"
            if self._chosen("conv_stem") and self._chosen("lr"):  # which was for that
                self._set(optimiser=replace(self.config.optimiser, lr=None))
                self.choices = [choice for choice in self.choices if choice.setting != "lr"]
                self._choose_rate()
            self.choices = [choice for choice in self.choices if choice.setting != "conv_stem"]
        self.choices.append(Choice("small_images", self.config.student.small_images, reason))

    def _choose_precision(self, seconds: float, enough: int) -> None:
        """bfloat16 on a processor that has it, where the time is short and that makes more steps of it."""
        short = self._has_fewer(enough, seconds)
        if self.may_take_bfloat16 and short and (gain := self._gain(WORTH_BFLOAT16, precision="bf16")):
            reason = f"the time is short, and bfloat16 makes {gain:.1f} times as many steps of it"
            self.choices.append(Choice("precision", "bf16", reason))

    @property
    def _may_halve(self) -> bool:
        config = self.config
        assert config.objective is not None
        chosen = self._chosen("batch_size") and not config.accumulate
        return chosen and config.loader.batch_size > FEWEST and config.objective.name not in NEED_A_BATCH

    def _halve_batch(self, seconds: float, enough: int) -> None:
        """Where the time is short, steps are worth more than the images in them: of as many images seen, 250 steps of 64 ended
        below the random start, 510 of 32 at 54 % and 1,030 of 16 at 64 % (MobileNetV3-Small, signdigits)."""
        more = 1.0
        while self._may_halve and self._has_fewer(enough, seconds):
            loader, optimiser = self.config.loader, self.config.optimiser
            half = max(FEWEST, loader.batch_size // 2)
            chosen = {choice.setting: number for number, choice in enumerate(self.choices)}
            lr = round(optimiser.peak * loader.batch_size / half, 6) if "lr" in chosen else optimiser.lr
            halved = {"loader": replace(loader, batch_size=half), "optimiser": replace(optimiser, lr=lr)}
            more *= self._gain(WORTH_HALVING, **halved)
            if not more:
                return
            reason = f"the time is short, and {more:.1f} times as many steps count for more"
            self.choices[chosen["batch_size"]] = Choice("batch_size", half, reason)
            if "lr" in chosen:
                scaled = f"x {half}/{LR_BATCH_SIZE} = {optimiser.peak * loader.batch_size / LR_BATCH_SIZE:g} in a step"
                self.choices[chosen["lr"]] = Choice("lr", lr, scaled)

    def _choose_one_view(self, seconds: float, enough: int) -> None:
        """One view of an image in a step in the place of two, where that buys steps and there is no time for twice as many as are
        enough: as many views in twice the steps take a little longer, and teach more."""
        pairing = self.config.pairing
        assert isinstance(pairing, PairingConfig)
        short = self._has_fewer(2 * enough, seconds)
        if self.may_see_one and short and (gain := self._gain(WORTH_HALVING, pairing=replace(pairing, step_targets=1))):
            reason = f"the time is short, and {gain:.1f} times as many steps count for more than a second view"
            self.choices.append(Choice("step_targets", 1, reason))

    def _choose_epochs(self, name: str, seconds: float | None) -> None:
        """As many as are enough, or as there is time for: that of the plan itself is taken off."""
        config, per_epoch, effort = self.config, self.steps_per_epoch, EFFORTS[name]
        of_one_view = self._chosen("step_targets")
        wanted = max(effort.epochs, ceil(effort.steps * (2 if of_one_view else 1) / per_epoch))
        words = effort.words if self.trial or seconds is None else "their time was not measured"
        reason = f"{wanted * per_epoch:,} steps are enough for --effort {name} ({words})"
        if seconds and self.trial:
            trial = self._try(min(MOST_TO_TRY, SHARE_TO_TRY * seconds), tuned=True)
            beside, first = (trial.seconds_of_run(config, self.run.data.num_images, epochs) for epochs in (0, 1))
            left = seconds - (time.monotonic() - self.began) - beside
            possible, least = max(1, int(left / (first - beside))), ceil(LEAST_STEPS / per_epoch)
            steps = f"{possible * per_epoch:,} steps are what"
            if config.budget:
                wanted, reason = possible, f"{steps} --budget {config.budget} has time for"
            elif possible < least:
                wanted = least
                reason = f"{least * per_epoch:,} steps, with fewer a student learns too little; --budget is obeyed"
            elif possible < wanted:
                wanted, reason = possible, f"{steps} --effort {name} has time for"
        self.choices.append(Choice("epochs", wanted, reason))
        self._set(epochs=wanted, effort=None, budget=None)
        self._choose_warmup(wanted)

    def _choose_warmup(self, epochs: int) -> None:
        optimiser = self.config.optimiser
        if optimiser.warmup_epochs is not None:
            return
        usual = optimiser.warmup(epochs)
        least = min(LEAST_WARMUP_STEPS / self.steps_per_epoch, epochs / 4)
        if least > usual:
            reason = f"a tenth, but {LEAST_WARMUP_STEPS} steps at least"
            if least == epochs / 4:
                reason = f"a quarter of the epochs, where {LEAST_WARMUP_STEPS} steps would be more"
            self.choices.append(Choice("warmup_epochs", round(least, 2), reason))
            self._set(optimiser=replace(optimiser, warmup_epochs=round(least, 2)))

    # ==== what it is chosen by ====

    def _chosen(self, setting: str) -> bool:
        return any(choice.setting == setting for choice in self.choices)

    def _set(self, **values: Any) -> None:
        self.config = replace(self.config, **values)

    def _try(self, seconds: float, tuned: bool = False) -> Trial:
        """Steps of the configuration as it is now, for so long; ``tuned`` as the run makes them, when all is chosen."""
        slowly = ", for which cuDNN chooses its algorithms: up to a minute" if tuned and not self.on_cpu else ""
        self.say(f"trying steps of {self.config.student.name}{slowly}")
        self.tuned = tuned
        # a budget and epochs exclude each other, and the trial has epochs of its own
        saving = self.trial and self.trial.checkpoint_seconds
        self.trial = try_steps(replace(self.config, effort=None, budget=None), self.run, seconds, tuned, saving)
        return self.trial

    def _has_fewer(self, steps: int, seconds: float) -> bool:
        """Whether ``seconds`` have time for fewer ``steps``, as they were tried last."""
        return self.trial is not None and seconds / self.trial.seconds < steps

    def _gain(self, worth: float, **change: Any) -> float:
        """Times as many steps in the same time with a ``change`` of the configuration, which stays. 0: they were less than
        ``worth``, and it was undone."""
        before, whole = self.config, self.trial
        assert whole is not None
        self._set(**change)
        gain = whole.seconds / self._try(SECONDS_TO_CHOOSE).seconds
        if gain < worth:
            self.config, self.trial = before, whole
            return 0.0
        return gain

    def measure(self) -> None:
        """Try steps as the run makes them, where none were tried so, and one process has them to itself."""
        as_run = self.trial is not None and (self.tuned or self.on_cpu)
        if not as_run and self.ranks.world_size == 1:
            self._try(SECONDS_TO_CHOOSE, tuned=True)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.run.data.num_images // self.config.loader.batch_size)

    @property
    def stride(self) -> int:
        return stride_of(self.config.student)


def power_of_two(most: int) -> int:
    """The largest up to ``most``."""
    return 1 << (most.bit_length() - 1)
