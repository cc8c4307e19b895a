"""What training relies on in every objective."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ...common.heads import Prototypes
from ..config import READ, ObjectiveConfig
from ..kernels.target import Target
from ..targets.dense import Placement, TargetWithPatches
from ..targets.space import TargetSpace
from .without_teacher import CopySettings


@dataclass(frozen=True)
class StudentMap:
    """The map of the student's global crops: ``width`` numbers at ``side`` x ``side`` positions; ``tokens``: of patches that can
    be hidden, as a ViT's.
    """

    width: int
    side: int
    tokens: bool


@dataclass(frozen=True, eq=False)
class ObjectiveContext:
    """What an objective is built from: its ``config``, for a student of ``num_features``, against targets of ``space``, in
    steps of ``target_views`` views of each image. ``num_images`` of the data set, where known, keeps a queue short enough.
    ``student_map``: where the objective reads targets of patches and there are some. ``num_global`` crops come first among the
    student's; None: as many as there are targets.
    """

    config: ObjectiveConfig
    num_features: int
    space: TargetSpace
    target_views: int = 2
    num_images: int | None = None
    student_map: StudentMap | None = None
    num_global: int | None = None


class Objective(nn.Module):
    """Owns the student's ``head`` (a subclass makes it, (N, F) -> (N, D)), and whatever it gathers from step to step.

    A paper is a subclass with a name, which is then an objective of ``ObjectiveConfig``::

        class MyObjective(Objective, name="mine"):
            ...

    Its class attributes are what the paper has. While ``watching``, a step leaves in ``targets_found`` what ``collapse`` says
    of its targets, scalars by name. ``teacher_temp`` may be set between steps, as a warm-up does.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``ObjectiveConfig`` that it reads beside the head's widths, and that others do not."""
    pairing: ClassVar[str] = "cross"
    """Which views meet in the paper (``targets.pairing``)."""
    only_pairing: ClassVar[bool] = False
    """Whether it has no other."""
    target_views: ClassVar[int] = 2
    """Of an image in a step."""
    global_views: ClassVar[int | None] = None
    """Of the student, against a frozen teacher's targets; None: as many as there are targets."""
    patch_drop: ClassVar[float | None] = None
    """Share of the patches of a ViT's global crops that its training leaves out."""
    published: ClassVar[CopySettings | None] = None
    """Training without a teacher; None: it needs one."""
    beside_teacher: ClassVar[CopySettings | None] = None
    """A copy of the student beside a frozen teacher, where a run asks for one: ``forward`` then gets a ``PairTarget``. None: it
    has no use for a copy."""
    joined_norm: ClassVar[bool] = False
    """Whether BatchNorm goes by the joined batch of a machine's ranks, as in SwAV's code (in DINO's, iBOT's and MSN's of
    all ranks), or by each rank's own."""
    norm_in_vits: ClassVar[bool] = True
    """Whether the head of a ViT has BatchNorm, too, where that is left open."""
    bottleneck: ClassVar[int] = 128
    """Width of the student's embedding, where no teacher's has to be met."""

    patch_kinds: ClassVar[tuple[str, ...]] = ()
    """Of targets of patches, those that it reads (``PatchSpace.kind``)."""
    patch_weight: float = 0.0
    """Of the loss of patches against that of views; 0: there is none."""
    patch_layer: int | None = None
    """Block or stage whose map meets the patches' targets; None: the last."""
    mask_token: nn.Parameter | None
    """(1, C) float32, what a ViT sees in place of a hidden patch; None: none are hidden."""

    head: nn.Module
    prototypes: Prototypes | None
    norm_by_size: bool = False
    """Whether the head's BatchNorm sees each crop size apart, as MSN's does, whose head runs once a size."""
    views_by_size: Sequence[int] = ()
    """With ``norm_by_size``: how many of a step's V views are of each crop size."""
    teacher_temp: float | None = None
    """Of the targets; None where it has no such option."""
    sinkhorn: str | None = None
    """As the option; None where it has no such option."""
    mean_entropy: float | None = None
    """Weight of the term; None where it has no such option."""

    def __init_subclass__(cls, name: str | None = None, **others: object) -> None:
        super().__init_subclass__(**others)
        if name is not None:
            OBJECTIVES[name], READ[name] = cls, cls.options

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__()
        self.watching = False
        self.targets_found: dict[str, Tensor] = {}
        self.centre_targets = context.config.centre_targets
        self.prototypes = None
        self.register_parameter("mask_token", None)
        if context.config.norm_by_size is not None:
            self.norm_by_size = context.config.norm_by_size

    @classmethod
    def embedding_dim(cls, config: ObjectiveConfig) -> int:
        """D without a teacher."""
        return cls.bottleneck

    def embed(self, features: Tensor) -> Tensor:
        """Features (..., F) to (..., D) float32 unit rows: what meets the targets, or the prototypes."""
        parts = features.split([*self.views_by_size] or features.shape[-2], dim=-2)
        return torch.cat([self.head(part.flatten(0, -2)).unflatten(0, part.shape[:-1]) for part in parts], dim=-2)

    def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
        """The loss, a scalar: features (B, V, F), target of G views an image, pair_weights (V, G).

        Without a target the student's own first G views are it; only objectives whose ``published`` say so are asked.
        """
        raise NotImplementedError

    @classmethod
    def patch_kinds_of(cls, config: ObjectiveConfig) -> tuple[str, ...]:
        """``patch_kinds``, none where the configuration gives patches no weight."""
        return () if config.patch_weight == 0 else cls.patch_kinds

    def hidden_patches(self, placement: Placement) -> Tensor | None:
        """(B, n, h, w) bool of the student's n global crops; None: it sees all."""
        return None

    def with_patches(
        self,
        features: Tensor,
        maps: Sequence[Tensor],
        hidden: Tensor | None,
        target: TargetWithPatches,
        pair_weights: Tensor,
    ) -> Tensor:
        """The loss of views and patches; ``maps`` (B, n, C, h, w), one a crop size, the global crops first. Only objectives with
        ``patch_kinds`` are asked.
        """
        pooled = self.forward(features, target.pooled, pair_weights)
        return pooled + self.patch_weight * self.patch_loss(maps, hidden, target)

    def patch_loss(self, maps: Sequence[Tensor], hidden: Tensor | None, target: TargetWithPatches) -> Tensor:
        """That of patches alone, a scalar; ``maps`` and ``hidden`` as ``with_patches`` has them."""
        raise NotImplementedError

    @property
    def prototype_weights(self) -> list[nn.Parameter]:
        """Of its ``prototypes``, where it has some."""
        return [] if self.prototypes is None else list(self.prototypes.parameters())

    def use_queue(self, serves: bool) -> None:
        """Whether the queue of Sinkhorn, if there is one, fills and serves in the steps that follow."""

    def copy_for_targets(self) -> Self:
        """A copy that only embeds: without what the student's gathers."""
        copy = deepcopy(self)
        copy.views_by_size = ()
        return copy


OBJECTIVES: dict[str, type[Objective]] = {}
"""By name, every named subclass of ``Objective``."""
