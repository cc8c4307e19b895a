"""The branch that was replaced: what makes the targets of a training step.

==========  ====================================================================================
cached      reads what the teacher said once
online      runs the frozen teacher in every step: a baseline, and the proof that the cache changes nothing
momentum    has no teacher, but the student itself or a slow copy of it
with copy   a teacher of the first two kinds, and a slow copy of the student beside it
ensemble    reads what several teachers said of the same views
==========  ====================================================================================

Each is a configuration (`Cached`, `Online`, `Momentum`, `WithCopy`, `Ensemble`) that a run opens with its own settings, and
the branch that comes of it, which says which views the student's targets belong to and answers, batch by batch, with a Target
(``with_copy``: with a PairTarget of two, ``ensemble``: with an EnsembleTarget).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...common.images.beton import Beton
from ...common.views.batch import Batch, ViewSet
from ...common.views.recipes import Recipe
from ..config import ObjectiveConfig
from ..kernels.target import Target
from ..objectives import OBJECTIVES
from ..student_config import StudentConfig
from ..student_with_head import StudentWithHead
from .dense import TargetWithPatches
from .joined import AnyTarget
from .pairing import ViewPlan
from .space import TargetSpace

USUAL_OVER_PROTOTYPES = "dino"


@dataclass(frozen=True, eq=False)
class RunContext:
    """What a branch has to know of the run: ``seed`` is also that of the views, unless a store has its own. ``objective`` None:
    the usual one. ``student``: whose copy may see views of its own; None: none does."""

    data: Beton
    device: torch.device
    precision: str = "fp32"
    seed: int = 0
    objective: ObjectiveConfig | None = None
    student: StudentConfig | None = None

    @property
    def reads_patches(self) -> bool:
        """Whether the objective has a use for targets of patches; not known yet of the usual one."""
        return self.objective is not None and bool(OBJECTIVES[self.objective.name].patch_kinds_of(self.objective))


class TargetBranch:
    """What training asks of a branch."""

    kind: ClassVar[str]
    """As the command line has it: cached, online or momentum."""
    from_student: ClassVar[bool] = False
    """Whether the targets are the student's own or its copy's: by default both branches then see the same views."""

    recipe: Recipe
    seed: int
    """Of the views; the student's training has a seed of its own."""
    views: int
    """Target views there are of an image: ids 0 .. views-1."""
    geometry: str | None = None
    """The resize path of the cached views; None when they are made on the spot."""
    window_blocks: int
    """Blocks within which the order may be shuffled."""
    space: TargetSpace
    source: str | list[str]
    """Where the targets come from, for ``config.json``; of several teachers each's."""
    description: dict[str, Any]
    """What the targets depend on, as plain values: a run is not resumed against others."""
    freeze_prototypes: int = 0
    """Epochs in which the student's prototypes usually stay as they are."""

    @property
    def usual_objective(self) -> str:
        """By name, what to learn of such targets where nothing else was asked for: see benchmarks/claims.py."""
        return USUAL_OVER_PROTOTYPES if self.space.num_prototypes else "embedding"

    @property
    def state(self) -> dict[str, nn.Module]:
        """What a checkpoint has to hold of the branch, by name."""
        return {}

    @property
    def average(self) -> nn.Module | None:
        """A slow copy of the student's backbone, exported beside it at the end."""
        return None

    def follow(self, model: StudentWithHead, steps_per_epoch: int, epochs: int) -> None:
        """Called once with the student and its objective before the first step."""

    def before_step(self, step: int) -> None:
        """Called before step number ``step`` (from 0)."""

    def after_step(self, step: int) -> None:
        """Called when step number ``step`` has moved the student."""

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        """Views that the loader must render for the branch itself, after the student's. MisuseError: it cannot serve them."""
        return ()

    @contextmanager
    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> Iterator[Callable[..., AnyTarget | None]]:
        """For one epoch in ``order``: ``target``, to be called with its batches one after the other."""
        yield self.target

    def target(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target | TargetWithPatches | None:
        """The target of ``batch``: row b belongs to image ``batch.image_ids[b]``.

        ``crops`` are the student's, as it will see them. None: the student makes its own target.
        """
        raise NotImplementedError
