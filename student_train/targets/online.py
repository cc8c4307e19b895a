"""Targets from the frozen teacher itself, run on every batch: the baseline without a cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ...common.config import ViewSize
from ...common.errors import MisuseError
from ...common.patches import PatchTargets, has_tokens
from ...common.run import autocast
from ...common.settings import check
from ...common.store.patches import AUTO, PatchChoice, resolve_patches
from ...common.teacher import FrozenTeacher, dense_embedder, embedder, on_device
from ...common.views.batch import Batch, ViewSet
from ...common.views.recipes import USUAL_RECIPE, Recipe, get_recipe
from ..kernels.target import EmbeddingTarget, Target
from ..objectives import OBJECTIVES
from .branch import RunContext, TargetBranch
from .cached import WINDOW_BLOCKS, patch_space, placed
from .config import TargetsConfig, Views
from .dense import TargetWithPatches
from .joined import AnyTarget
from .pairing import ViewPlan
from .space import TargetSpace


@dataclass(frozen=True, eq=False)
class Online(TargetsConfig):
    """The loaded ``teacher``, which is moved to the run's device, at ``view_size`` pixels (None: its own size).

    ``views`` bounds the view ids as a cache would: the same value gives the same views, and the same targets, as a
    cache of so many. ``patches`` are those that an objective reads which has a use for some; None: all numbers of a grid, or what
    goes into the prototypes. No PCA is fitted.
    """

    teacher: FrozenTeacher
    recipe: Recipe = field(default_factory=lambda: get_recipe(USUAL_RECIPE))
    views: Views = 4
    view_size: ViewSize = None
    patches: PatchChoice | None = None

    def __post_init__(self) -> None:
        check(self)

    def open(self, run: RunContext) -> "OnlineTargets":
        return OnlineTargets(self, run)


class OnlineTargets(TargetBranch):
    """What the teacher says of a batch's own views."""

    kind = source = "online"
    window_blocks = WINDOW_BLOCKS

    def __init__(self, config: Online, run: RunContext) -> None:
        self.teacher = teacher = on_device(config.teacher, run.device)
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
        seen = teacher, self.recipe, self.view_size, run.device, run.precision
        self.patches, self.data = self._patches(config, run), run.data
        if self.patches is None:
            self.embed = embedder(*seen)
            return
        self.dense_embed = dense_embedder(*seen)
        self.space = replace(self.space, patches=patch_space(self.patches.encoding, teacher.patch_centre))

    def _patches(self, config: Online, run: RunContext) -> PatchTargets | None:
        """What makes patch targets of the teacher's maps; None: the objective reads none, or the teacher has none for it."""
        teacher = self.teacher
        if not run.reads_patches:
            return None
        assert run.objective is not None
        kinds = OBJECTIVES[run.objective.name].patch_kinds_of(run.objective)
        choice = config.patches
        if choice is None or choice.patches == AUTO:
            if "grid" not in kinds and (teacher.patch_prototypes is None or not has_tokens(teacher.backbone)):
                return None  # the class token alone
            choice = PatchChoice("grid", patch_dim=0) if "grid" in kinds else PatchChoice("embedding")
        with torch.no_grad(), autocast(run.device, run.precision):
            size = self.view_size
            features = teacher.with_map(torch.zeros(1, 3, size, size, device=run.device))[1]
        number = 0 if teacher.patch_prototypes is None else len(teacher.patch_prototypes)
        name = f"teacher {teacher.name}"
        encoding = resolve_patches(choice, name, features.shape[2], features.shape[1], teacher.dim, number)
        if encoding is None:
            return None
        if encoding.reduced:
            raise MisuseError("`patch_dim` needs a PCA, which only a store has: use 0 with `targets` online")
        return PatchTargets(encoding, teacher.head, teacher.patch_prototypes, {}, run.device)

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        return (ViewSet(plan.targets, self.view_size),)

    @contextmanager
    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> Iterator[Callable[..., AnyTarget]]:
        def target(batch: Batch, crops: Sequence[Tensor] = ()) -> AnyTarget:
            if self.patches is None:
                return self.target(batch, crops)
            embedding, features = self.dense_embed(batch)
            rows = self.patches.rows(features.flatten(0, 1).clone()).unflatten(0, features.shape[:2])
            prototypes = None if self.patches.encoding.kind == "grid" else self.teacher.patch_prototypes
            pooled = EmbeddingTarget(embedding.clone(), self.teacher.prototypes)
            placement = placed(batch.image_ids, self.data, plan, self.recipe, self.seed)
            return TargetWithPatches(pooled, EmbeddingTarget(rows.flatten(1, 2), prototypes), placement)

        yield target

    def target(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target:
        embedding = self.embed(batch).clone()  # out of inference mode: autograd may save it
        return EmbeddingTarget(embedding, self.teacher.prototypes)
