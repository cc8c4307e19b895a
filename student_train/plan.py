"""The plan of a run: what was left open, chosen for the images, the student and the machine, with what it will cost.

``make_plan`` is what ``train_student`` begins with; the command line prints it. Where both the epochs and the batch are given,
or a preset gives them, the run is planned already: the rest is as published, and only its cost is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..common.errors import MisuseError
from ..common.images.beton import Beton
from ..common.ranks import ALONE, Ranks, from_main
from ..common.run import PRECISIONS, autocast, choose_precision, free_memory, pick_device
from .begun import as_begun, begun_objective, read_begun
from .config import ObjectiveConfig, PairingConfig
from .extension import as_parent, settings_of_parent
from .objectives import OBJECTIVES
from .plan_warnings import warnings_of
from .planner import Choice, Planner
from .run_folder import refuse_what_is_no_run
from .start import with_start
from .students import build_student, with_usual_patch_drop
from .targets.branch import RunContext, TargetBranch
from .targets.pairing import choose_pairing
from .train_config import LoaderByPlan, TrainConfig
from .trainer import student_map_of
from .trial import Trial

WORTH_MEASURING = 50
"""Steps of a run: a shorter one is over before its length is known."""


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
        """Seconds for the whole run, including checkpoints and the final comparison."""
        assert self.config.epochs is not None
        return self.trial and self.trial.seconds_of_run(self.config, self.num_images, self.config.epochs)

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
    return plan_run(*opened(config, device), measured=True)


def _begun_in(out: Path) -> dict[str, Any] | None:
    begun = read_begun(out)  # first: it says when the settings of a run that could go on are damaged
    refuse_what_is_no_run(out)
    return begun


def opened(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, RunContext, TargetBranch]:
    """The targets of ``config``, which then names its objective: the usual one of such targets, where none was asked for."""
    begun = from_main(lambda: _begun_in(config.out))
    if begun is None and config.extend and config.objective is None:
        raise MisuseError("`extend`: name the `objective` of the run that goes on")
    config = replace(config, student=with_start(config.student, begun))
    if config.precision == "auto" and begun is not None and begun.get("precision") in PRECISIONS:
        config = replace(config, precision=begun["precision"])
    autocast(device, config.precision)  # refuses what this device does not have
    data = Beton(config.data, config.local_dir)
    precision = choose_precision(device, config.precision)
    run = RunContext(data, device, precision, config.seed, config.objective, config.student)
    branch = config.targets.open(run)
    if config.objective is None:
        name = begun_objective(begun) or usual_objective(config, branch)
        config = replace(config, objective=ObjectiveConfig(name))
        run = replace(run, objective=config.objective)
        if run.reads_patches:  # which nobody had asked for until now
            branch = config.targets.open(run)
    return config, run, branch


def usual_objective(config: TrainConfig, branch: TargetBranch) -> str:
    """The name of what such a student learns from such targets, where nothing is asked for."""
    usual = branch.usual_objective
    return "embedding" if usual == "patch" and not can_learn_patches(config, branch) else usual


def can_learn_patches(config: TrainConfig, branch: TargetBranch) -> bool:
    """Whether the student has a map of more than one position, with timm's stem if the plan gives it that, and nothing else that
    is asked for stands against it."""
    if config.compile not in (None, "off"):
        return False
    student, pairing = replace(config.student, small_images=bool(config.student.small_images)), config.pairing
    try:
        if not isinstance(pairing, PairingConfig):
            pairing = choose_pairing("patch", branch.recipe, branch.views, pairing, branch.from_student)
        asked = replace(config, student=student, objective=ObjectiveConfig("patch"), pairing=pairing)
        with torch.random.fork_rng(devices=[]):
            return student_map_of(asked, build_student(student), branch.space.of_student).side > 1
    except MisuseError:
        return False


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
        config = as_begun(replace(config, epochs=config.extend or config.epochs), begun)
    elif config.extend:
        config = as_parent(config, settings_of_parent(config.student.init, config.extend))
    assert isinstance(config.objective, ObjectiveConfig)
    share = OBJECTIVES[config.objective.name].patch_drop
    config = replace(config, student=with_usual_patch_drop(config.student, share))
    planner = Planner(config, run, branch, ranks, say)
    if not isinstance(config.loader, LoaderByPlan) and run.data.num_images < config.loader.batch_size:
        raise MisuseError(
            f"`batch_size` {config.loader.batch_size} is more than the {run.data.num_images} images of {run.data.path}"
        )
    if begun is None and not config.extend:
        planner.choose_head()
    if config.epochs is None or isinstance(config.loader, LoaderByPlan):
        planner.choose()
    else:
        planner.as_published()
    config = planner.config
    # A run without says nothing of it, as those from before there was a choice.
    config = replace(config, student=replace(config.student, conv_stem=config.student.conv_stem or None))
    assert config.epochs is not None
    steps = planner.steps_per_epoch * config.epochs
    if measured and steps >= WORTH_MEASURING:
        planner.measure()
    free, data = free_memory(run.device), run.data
    warnings = warnings_of(config, steps, planner.trial, free, branch, planner.stride, data.manifest.classes)
    choices = tuple(planner.choices)
    return TrainPlan(config, choices, tuple(warnings), data.num_images, planner.steps_per_epoch, planner.trial, free)
