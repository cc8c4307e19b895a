"""Targets from the frozen teacher itself, run on every batch: the baseline without a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...common.config import ViewSize
from ...common.settings import check
from ...common.teacher import FrozenTeacher, embedder
from ...common.views.batch import Batch, ViewSet
from ...common.views.recipes import Recipe, get_recipe
from ..kernels.target import EmbeddingTarget, Target
from .branch import RunContext, TargetBranch
from .cached import WINDOW_BLOCKS
from .config import Views
from .pairing import ViewPlan
from .space import TargetSpace


@dataclass(frozen=True, eq=False)
class Online:
    """The loaded ``teacher``, which is on the run's device, at ``view_size`` pixels (None: its own size).

    ``views`` bounds the view ids as a cache would: the same value gives the same views, and the same targets, as a
    cache of so many.
    """

    teacher: FrozenTeacher
    recipe: Recipe = field(default_factory=lambda: get_recipe("dino"))
    views: Views = 4
    view_size: ViewSize = None

    def __post_init__(self) -> None:
        check(self)

    def open(self, run: RunContext) -> "OnlineTargets":
        return OnlineTargets(self, run)


class OnlineTargets(TargetBranch):
    """What the teacher says of a batch's own views."""

    kind = source = "online"
    window_blocks = WINDOW_BLOCKS

    def __init__(self, config: Online, run: RunContext) -> None:
        self.teacher = teacher = config.teacher
        self.recipe, self.seed, self.views = config.recipe, run.seed, config.views
        self.view_size = config.view_size or teacher.view_size
        self.space = TargetSpace(
            teacher.dim,
            teacher.num_prototypes,
            has_embedding=True,
            teacher_temp=teacher.teacher_temp,
            centre=teacher.centre,
            prototypes=teacher.prototypes,
        )
        self.description = {
            "kind": self.kind,
            "teacher": teacher.name,
            "weights_hash": teacher.weights_hash,
            "num_prototypes": teacher.num_prototypes,
            "view_size": self.view_size,
            "precision": run.precision,
            "views": self.views,
            "seed": self.seed,
        }
        self.embed = embedder(teacher, self.recipe, self.view_size, run.device, run.precision)

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        return (ViewSet(plan.targets, self.view_size),)

    def target(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target:
        embedding = self.embed(batch).clone()  # out of inference mode: autograd may save it
        return EmbeddingTarget(embedding, self.teacher.prototypes)
