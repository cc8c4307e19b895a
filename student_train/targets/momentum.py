"""The target branch as self-supervised learning has it: no teacher, but the student itself, or a slow copy of it.

==========  ==========================================  ==========================  =================================
objective   who makes the target                        temperature                 source
==========  ==========================================  ==========================  =================================
dino, ibot  a copy, momentum .996 to 1 (cosine)         .04 to .07 over 50 epochs   2104.14294, section 3.1; SSLight's
                                                        (ibot 30)                   ``dino_cnn_baseline.yaml``
msn         a copy, momentum .996 to .9992 (linear);    .025                        2204.07141, section 3;
            prototypes are the student's own                                        msn ``msn_train.py``
swav        the student itself, without gradient        .05                         2006.09882, section 3
moco        a copy, momentum .999                                                   2003.04297, DisCo's .999
==========  ==========================================  ==========================  =================================

The objectives are those of distillation and do not notice. Views are new in every epoch. Both branches see the same global crops,
and none meets itself; with ``fresh`` each has its own, as MSN's and MoCo's code: one target view and one key of an image
(``step_targets`` 1). The copy is exported as ``student_average.safetensors``: DINO evaluates that one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...common.errors import MisuseError
from ...common.ranks import current_ranks, joined
from ...common.run import autocast, pixel_dtype
from ...common.settings import check
from ...common.views.batch import Batch, ViewSet
from ...common.views.recipes import USUAL_ALONE, Recipe, get_recipe
from ..kernels.target import EmbeddingTarget, Target
from ..objectives import OBJECTIVES, CopySettings, MocoObjective, ObjectiveConfig
from ..optimiser import cosine_decay
from ..student_with_head import StudentWithHead
from ..students import describe_student
from .branch import USUAL_OVER_PROTOTYPES, RunContext, TargetBranch
from .cached import placed
from .config import CopyMomentum, CopyPrototypes, SplitBatchnorm, TargetsConfig, WarmupTeacherTempEpochs
from .dense import Placement, TargetWithPatches
from .joined import AnyTarget
from .pairing import ViewPlan
from .space import PatchSpace, TargetSpace

UNBOUNDED = (1 << 20) + 1
"""Target views that there are of an image: more than any training uses. Odd: where a recipe has two kinds of global crops, which
ids take in turn, the copy's own view is of the one and the student's of the other."""


def published(objective: str) -> CopySettings:
    """The paper's values. MisuseError: an objective that needs a frozen teacher."""
    settings = OBJECTIVES[objective].published
    if settings is None:
        able = ", ".join(name for name, kind in OBJECTIVES.items() if kind.published is not None)
        raise MisuseError(f"`objective` {objective} needs a teacher: with `targets` momentum there is {able}")
    return settings


def unread_options(objective: str) -> dict[str, str]:
    """The fields of ``Momentum`` that the objective has no use for, and why. MisuseError as ``published``."""
    usual = published(objective)
    reasons = {
        "prototypes": "" if usual.prototypes else "has none",
        "copy_momentum": "" if usual.copy_momentum is not None else "makes its targets without a copy",
        "warmup_teacher_temp_epochs": "" if usual.warmup_teacher_temp_epochs else "has no warm-up",
        "split_batchnorm": "" if issubclass(OBJECTIVES[objective], MocoObjective) else "shuffles no keys",
    }
    return {option: reason for option, reason in reasons.items() if reason}


@dataclass(frozen=True)
class Momentum(TargetsConfig):
    """No teacher. What is None is as the objective's paper has it: the number of ``prototypes`` K, the ``copy_momentum`` at the
    start, and the epochs in which the teacher's temperature rises (0: it is what it is from the start)."""

    recipe: Recipe = field(default_factory=lambda: get_recipe(USUAL_ALONE))
    prototypes: CopyPrototypes = None
    copy_momentum: CopyMomentum = None
    warmup_teacher_temp_epochs: WarmupTeacherTempEpochs = None
    split_batchnorm: SplitBatchnorm = None

    def __post_init__(self) -> None:
        check(self)

    def open(self, run: RunContext) -> "MomentumTargets":
        """MisuseError: the objective needs a frozen teacher, or has no use for one of these settings."""
        objective = run.objective or ObjectiveConfig(USUAL_OVER_PROTOTYPES)
        if objective.head_type == "mlp":  # a target of an embedding has no biases
            raise MisuseError("`head_type` mlp is for a frozen teacher's targets: leave it out with `targets` momentum")
        return MomentumTargets(self.recipe, self.settings(objective.name), objective, run)

    def settings(self, objective: str) -> CopySettings:
        """The published values with those that are given."""
        usual = published(objective)
        warmup = self.warmup_teacher_temp_epochs
        parts = None if self.split_batchnorm == 1 else self.split_batchnorm
        given = {
            "prototypes": self.prototypes,
            "copy_momentum": self.copy_momentum,
            "warmup_teacher_temp_epochs": warmup or None,
            "split_batchnorm": parts,
        }
        for option, reason in unread_options(objective).items():
            if given[option] is not None:
                raise MisuseError(f"`{option}`: `objective` {objective} {reason}, leave it out")
        return replace(
            usual if self.copy_momentum is None else usual.with_momentum(self.copy_momentum),
            prototypes=self.prototypes or usual.prototypes,
            warmup_teacher_temp_epochs=usual.warmup_teacher_temp_epochs if warmup is None else warmup,
            split_batchnorm=parts,
        )


class MomentumTargets(TargetBranch):
    """Targets by a momentum copy of the student, from the student's global crops or its own, or by the student itself."""

    kind = source = "momentum"
    from_student = True
    window_blocks = 256
    """65,536 images: no store has to follow, and batches of few classes would bias centres, queues and BatchNorm."""
    views = UNBOUNDED

    def __init__(self, recipe: Recipe, settings: CopySettings, objective: ObjectiveConfig, run: RunContext) -> None:
        self.settings = replace(settings, teacher_temp=objective.teacher_temp or settings.teacher_temp)
        self.recipe, self.seed, self.device, self.precision = recipe, run.seed, run.device, run.precision
        self.data, self.student = run.data, run.student
        self.objective, self.queue = objective.name, objective.queue
        self.space = TargetSpace(
            OBJECTIVES[objective.name].embedding_dim(objective),
            self.settings.prototypes,
            has_embedding=True,
            teacher_temp=self.settings.teacher_temp,
            usual_centre=self.settings.centre,
            of_student=True,
            patches=PatchSpace("student", 0, 0, self.settings.prototypes)
            if OBJECTIVES[objective.name].patch_kinds_of(objective)
            else None,
        )
        self.freeze_prototypes = self.settings.freeze_prototypes
        self.description = {"kind": self.kind, "seed": self.seed, **asdict(self.settings)}
        self.model: StudentWithHead
        self.copy: StudentWithHead | None = None

    # ==== as every branch ====

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        if plan.num_replayed and plan.pair_weights.diagonal().any():
            raise MisuseError(
                "with `targets` momentum a view that meets itself has nothing to learn: leave out `pairing`, which is cross"
            )
        if plan.globals == plan.targets:
            return ()
        if plan.num_replayed:
            or_fresh = "" if self.settings.copy_momentum is None else ", or use `fresh`, with which each has its own"
            raise MisuseError(
                f"with `targets` momentum both branches see the same views: leave out `step_globals`{or_fresh}"
            )
        if self.settings.copy_momentum is None:
            raise MisuseError(
                f"`fresh` is for a copy's own views, and `objective` {self.objective} makes its targets of the student's: leave "
                "it out"
            )
        assert self.student is not None
        return (ViewSet(plan.targets, self.student.image_size),)

    @contextmanager
    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> Iterator[Callable[..., AnyTarget | None]]:
        own = bool(self.view_sets(plan))

        def target(batch: Batch, crops: Sequence[Tensor] = ()) -> AnyTarget | None:
            if own:
                return self.embed(self.own_views(batch))
            if not self.model.objective.patch_weight:
                return self.target(batch, crops)
            return self.embed_with_patches(crops[0], placed(batch.image_ids, self.data, plan, self.recipe, self.seed))

        yield target

    def target(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target | None:
        return self.embed(crops[0])

    def own_views(self, batch: Batch) -> Tensor:
        """(B, G, 3, S, S): the last of the batch's sets as the student would see it."""
        assert self.student is not None
        scale = self.student.image_size / self.recipe.global_crops[0].size
        last = len(batch.colour) - 1
        return batch.augment(last, scale, *self._mean_and_std, pixel_dtype(self.device, self.precision))

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        assert self.student is not None
        info = describe_student(self.student)
        return torch.tensor(info.mean, device=self.device), torch.tensor(info.std, device=self.device)

    # ==== beside the training ====

    def follow(self, model: StudentWithHead, steps_per_epoch: int, epochs: int) -> None:
        """Start as ``model`` is now. MisuseError: a queue is asked for that never serves."""
        start = self.settings.queue_from_epoch
        if self.queue is not None and epochs <= start:
            raise MisuseError(
                f"`queue` {self.queue}: without a teacher it begins to fill in epoch {start}, and the last of `epochs` {epochs} "
                f"is {epochs - 1}: leave `queue` out, or train longer"
            )
        if self.settings.split_batchnorm is not None:
            model.parts = shuffled_parts(model, self.settings.split_batchnorm)
        self.model, self.steps_per_epoch, self.total_steps = model, steps_per_epoch, steps_per_epoch * epochs
        if self.settings.copy_momentum is not None:
            self.copy = model.copy_for_targets()
            self._slow, self._fast = list(self.copy.parameters()), list(model.parameters())

    @property
    def state(self) -> dict[str, nn.Module]:
        return {} if self.copy is None else {"momentum": self.copy}

    @property
    def average(self) -> nn.Module | None:
        """The copy's backbone: what DINO evaluates."""
        return None if self.copy is None else self.copy.backbone

    def before_step(self, step: int) -> None:
        """Set the temperature of step number ``step`` (from 0), and whether Sinkhorn's queue takes part in it."""
        epoch = step // self.steps_per_epoch
        self.model.objective.teacher_temp = self.teacher_temp(epoch)
        self.model.objective.use_queue(epoch >= self.settings.queue_from_epoch)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the copy towards the student; BatchNorm's statistics are its own."""
        if self.copy is None:
            return
        move_towards(self._slow, self._fast, self.momentum(step))

    def teacher_temp(self, epoch: int) -> float:
        """DINO's schedule: equal steps from epoch 0, the last value at the end of the warm-up. It only ever rises: a sharper last
        value holds from the start.
        """
        last, epochs = self.settings.teacher_temp, self.settings.warmup_teacher_temp_epochs
        if epoch >= epochs:
            return last
        first = min(self.settings.warmup_teacher_temp, last)
        return first + epoch / max(1, epochs - 1) * (last - first)

    def momentum(self, step: int) -> float:
        """From the first value at step 0 towards the last: DINO's cosine, or MSN's line."""
        start, end = self.settings.copy_momentum, self.settings.momentum_end
        assert start is not None
        done = step / (self.total_steps * self.settings.momentum_runs)
        left = 1 - done if self.settings.linear_momentum else cosine_decay(done, 1)
        return end + (start - end) * left

    @torch.no_grad()
    def embed(self, crops: Tensor) -> Target | None:
        """What the copy says of the student's global crops (B, G, 3, S, S); None leaves it to the student."""
        if self.copy is None:
            return None
        with autocast(self.device, self.precision):
            embedding = self.copy.objective.embed(self._features(self.copy, crops))
        return EmbeddingTarget(embedding, self._prototypes)

    @torch.no_grad()
    def embed_with_patches(self, crops: Tensor, placement: Placement) -> TargetWithPatches:
        """The same of the views, and of every patch of each: none is hidden from the copy."""
        assert self.copy is not None
        with autocast(self.device, self.precision):
            features, maps = self.copy.features_and_map(crops)
            rows = maps.flatten(3).mT.flatten(1, 2)  # (B, G * P, C)
            embedding, of_patches = self.copy.objective.embed(features), self.copy.objective.embed(rows)
        prototypes = self._prototypes
        return TargetWithPatches(
            EmbeddingTarget(embedding, prototypes), EmbeddingTarget(of_patches, prototypes), placement
        )

    @property
    def _prototypes(self) -> Tensor | None:
        source = self.model if self.settings.own_prototypes else self.copy
        assert source is not None
        prototypes = source.objective.prototypes
        return None if prototypes is None else prototypes.matrix().detach()

    def _features(self, copy: StudentWithHead, crops: Tensor) -> Tensor:
        """(B, G, F) of the copy. With ``split_batchnorm`` its parts are of images of all ranks, shuffled: ShuffleBN (1911.05722,
        3.3)."""
        if self.settings.split_batchnorm is None:
            return copy.features(crops)
        everyone, first = joined(crops), current_ranks().rank * len(crops)
        mine = slice(first, first + len(crops))
        order = torch.randperm(len(everyone)).to(crops.device, non_blocking=True)
        order = joined(order)[: len(everyone)]  # rank 0's
        return joined(copy.features(everyone[order[mine]]))[order.argsort()[mine]]


@torch.no_grad()
def move_towards(slow: Sequence[Tensor], fast: Sequence[Tensor], momentum: float) -> None:
    """slow = momentum * slow + (1 - momentum) * fast, tensor by tensor; on a GPU all of them in a few launches."""
    assert len(slow) == len(fast)
    torch._foreach_lerp_(list(slow), list(fast), 1 - momentum)


def shuffled_parts(model: StudentWithHead, parts: int) -> int:
    """A rank's share of ``parts``. MisuseError: the student cannot see its batches in so many."""
    world_size = current_ranks().world_size
    if not any(isinstance(layer, _BatchNorm) for layer in model.backbone.modules()):
        raise MisuseError(
            "`split_batchnorm` is for a student with BatchNorm, and this one has none: leave it out, or 1"
        )
    if parts % world_size:
        raise MisuseError(
            f"`split_batchnorm` {parts} cannot be shared by {world_size} ranks: take a multiple, or 1 for unshuffled keys"
        )
    if model.parts > parts // world_size:
        raise MisuseError(
            f"`split_batchnorm` {parts} makes larger parts than `accumulate` {model.parts}: use {model.parts * world_size} or "
            "more, or less of the latter"
        )
    return parts // world_size
