"""A target branch made of two: a frozen teacher's targets, and a slow copy of the student beside it.

DisCo (2104.09124, section 3) has both: the teacher's embedding to be consistent with, and MoCo's keys from the copy. The
teacher is a store or runs online, and is what it is without the copy: views, temperature, centre and queue are as ever. The
copy sees the student's own global crops, follows it after every step, is in the checkpoint and is exported, all as in
``momentum``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from ...common.errors import MisuseError
from ...common.settings import check
from ...common.views.batch import Batch, ViewSet
from ..kernels.target import EmbeddingTarget, Target
from ..objectives import OBJECTIVES, CopySettings, ObjectiveConfig
from ..student_with_head import StudentWithHead
from .branch import RunContext, TargetBranch
from .config import CopyMomentum, SplitBatchnorm, TargetsConfig
from .joined import PairTarget
from .momentum import MomentumTargets
from .pairing import ViewPlan

USUAL_WITH_COPY = "disco"


@dataclass(frozen=True, eq=False)
class WithCopy:
    """The targets of ``frozen``, a ``Cached`` or ``Online``, and a copy of the student, set as in ``Momentum``."""

    frozen: TargetsConfig
    copy_momentum: CopyMomentum = None
    split_batchnorm: SplitBatchnorm = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def stores(self) -> tuple[Path, ...]:
        return self.frozen.stores

    def open(self, run: RunContext) -> "TargetsWithCopy":
        """MisuseError: the objective has no use for the copy, or ``frozen`` is no teacher's."""
        objective = run.objective or ObjectiveConfig(USUAL_WITH_COPY)
        settings = self.settings(objective.name)
        frozen = self.frozen.open(run)
        if frozen.from_student:
            raise MisuseError(
                f"`with_copy` puts a copy beside a teacher, and `targets` {frozen.kind} have none: leave `with_copy` out"
            )
        if frozen.space.members:
            raise MisuseError(
                f"`with_copy` puts a copy beside one teacher, and `targets` are {len(frozen.space.members)}: give one, or leave "
                "`with_copy` out"
            )
        return TargetsWithCopy(frozen, MomentumTargets(frozen.recipe, settings, objective, run))

    def settings(self, objective: str) -> CopySettings:
        """The published values with those that are given."""
        usual = OBJECTIVES[objective].beside_teacher
        if usual is None:
            able = ", ".join(name for name, kind in OBJECTIVES.items() if kind.beside_teacher is not None)
            raise MisuseError(
                f"`with_copy`: `objective` {objective} has no use for a copy beside its teacher, it is for {able}: leave it out"
            )
        usual = replace(usual, split_batchnorm=None if self.split_batchnorm == 1 else self.split_batchnorm)
        return usual if self.copy_momentum is None else usual.with_momentum(self.copy_momentum)


class TargetsWithCopy(TargetBranch):
    """The branch ``frozen`` to all that asks, with a ``moving`` one beside it."""

    def __init__(self, frozen: TargetBranch, moving: MomentumTargets) -> None:
        self.frozen, self.moving = frozen, moving
        self.kind = frozen.kind  # type: ignore[misc]
        self.recipe, self.seed, self.views, self.geometry = frozen.recipe, frozen.seed, frozen.views, frozen.geometry
        self.window_blocks, self.source = frozen.window_blocks, frozen.source
        self.freeze_prototypes = frozen.freeze_prototypes
        self.space = replace(frozen.space, has_copy=True)
        told = ("copy_momentum", "momentum_end", "split_batchnorm")
        self.description = frozen.description | {name: getattr(moving.settings, name) for name in told}

    @property
    def usual_objective(self) -> str:
        return USUAL_WITH_COPY

    @property
    def state(self) -> dict[str, nn.Module]:
        return self.frozen.state | self.moving.state

    @property
    def average(self) -> nn.Module | None:
        return self.moving.average

    def follow(self, model: StudentWithHead, steps_per_epoch: int, epochs: int) -> None:
        self.frozen.follow(model, steps_per_epoch, epochs)
        self.moving.follow(model, steps_per_epoch, epochs)

    def before_step(self, step: int) -> None:
        self.frozen.before_step(step)  # not the moving one's, which would set a temperature beside the teacher's

    def after_step(self, step: int) -> None:
        self.frozen.after_step(step)
        self.moving.after_step(step)

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        return self.frozen.view_sets(plan)

    @contextmanager
    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> Iterator[Callable[..., PairTarget]]:
        with self.frozen.targets(order, batch_size, plan) as frozen_target:

            def target(batch: Batch, crops=()) -> PairTarget:
                frozen, moving = frozen_target(batch, crops), self.moving.embed(crops[0])
                assert isinstance(frozen, Target) and isinstance(moving, EmbeddingTarget), (
                    "neither leaves it to the student"
                )
                return PairTarget(frozen, moving)

            yield target
