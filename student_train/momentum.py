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

The objectives are those of distillation and do not notice. Both branches see the same views of a step, new in every epoch, and
a view never meets itself. The copy is exported as ``student_average.safetensors``: DINO evaluates that one.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..common.errors import MisuseError
from ..common.run import autocast
from ..common.views.loader import Batch, ViewSet
from ..common.views.recipes import Recipe
from .branches import TargetBranch, TargetSpace
from .kernels.target import EmbeddingTarget, Target
from .objectives import OBJECTIVES, ObjectiveConfig
from .objectives.centre import SinkhornCentre
from .objectives.prototypes import PrototypeObjective
from .pairing import ViewPlan

UNBOUNDED = 1 << 20
"""Target views that there are of an image: more than any training uses."""

MOCO_DIM = 128


@dataclass(frozen=True)
class MomentumConfig:
    """``num_prototypes`` is K (0: none). The copy's momentum goes from ``momentum`` to ``momentum_end`` along a cosine or, with
    ``linear_momentum``, in equal steps, over ``momentum_runs`` times the run: above 1, a run ends before the end of it. A
    ``momentum`` of None: the student makes its own targets. ``teacher_temp`` is reached from ``warmup_teacher_temp`` in
    ``warmup_teacher_temp_epochs`` equal steps, one an epoch. Sinkhorn's queue, if any, begins to fill in
    ``queue_from_epoch`` (from 0): the embeddings of a network that learns fast are stale in a few steps, and codes balanced
    over them give one batch's images all the same one.
    """

    num_prototypes: int = 4096
    momentum: float | None = 0.996
    momentum_end: float = 1.0
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    linear_momentum: bool = False
    momentum_runs: float = 1.0
    queue_from_epoch: int = 0

    def with_momentum(self, momentum: float) -> "MomentumConfig":
        """Another value at the start; at the end too where the copy's momentum stays, as MoCo's."""
        stays = self.momentum == self.momentum_end
        return replace(self, momentum=momentum, momentum_end=momentum if stays else self.momentum_end)


PUBLISHED: dict[str, MomentumConfig] = {
    "dino": MomentumConfig(warmup_teacher_temp_epochs=50),
    "ibot": MomentumConfig(num_prototypes=8192, warmup_teacher_temp_epochs=30),
    "msn": MomentumConfig(num_prototypes=1024, teacher_temp=0.025, linear_momentum=True, momentum_runs=1.25),
    "swav": MomentumConfig(num_prototypes=3000, momentum=None, teacher_temp=0.05, queue_from_epoch=15),
    "moco": MomentumConfig(num_prototypes=0, momentum=0.999, momentum_end=0.999),
}
"""By objective; the others need a teacher."""


def published(objective: str) -> MomentumConfig:
    """The paper's values, of DINO with SSLight's K for small networks (DINO's own is 65536). MisuseError: an objective that
    needs a frozen teacher."""
    if objective not in PUBLISHED:
        raise MisuseError(
            f"--objective {objective} needs a teacher: with --targets momentum there is {', '.join(PUBLISHED)}"
        )
    return PUBLISHED[objective]


def unread_options(objective: str) -> dict[str, str]:
    """The options of the copy that the objective has no use for, and why. MisuseError as ``published``."""
    usual = published(objective)
    reasons = {
        "prototypes": "" if usual.num_prototypes else "has none",
        "copy_momentum": "" if usual.momentum is not None else "makes its targets without a copy",
        "warmup_teacher_temp_epochs": "" if usual.warmup_teacher_temp_epochs else "has no warm-up",
    }
    return {option: reason for option, reason in reasons.items() if reason}


class MomentumBranch(TargetBranch):
    """Targets from the student's global crops, by a momentum copy of it or by itself."""

    geometry = None
    window_blocks = 256
    """65,536 images: no store has to follow, and batches of few classes would bias centres, queues and BatchNorm."""
    views = UNBOUNDED

    def __init__(
        self,
        objective: ObjectiveConfig,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        config: MomentumConfig | None = None,
        precision: str = "fp32",
    ) -> None:
        """MisuseError: an objective that needs a frozen teacher."""
        usual = published(objective.name)
        config = config or usual
        teacher_temp = objective.teacher_temp or config.teacher_temp
        self.config = replace(config, teacher_temp=teacher_temp)
        self.recipe, self.seed, self.device, self.precision = recipe, seed, device, precision
        self.queue = objective.queue
        kind = OBJECTIVES[objective.name]
        dim = MOCO_DIM
        if issubclass(kind, PrototypeObjective):
            dim = objective.bottleneck or kind.bottleneck
        self.own_prototypes = objective.name == "msn"
        # Without a centre or Sinkhorn all images of a fresh DINO end at one prototype.
        centre = "running" if objective.name in ("dino", "ibot") else "none"
        self.space = TargetSpace(dim, self.config.num_prototypes, True, self.config.teacher_temp, usual_centre=centre)
        self.freeze_prototypes = int(objective.name in ("dino", "ibot", "swav"))
        self.description = {"kind": "momentum", "seed": seed, **asdict(self.config)}
        self.model: Any = None
        self.copy: Any = None
        """Both ``train.StudentWithHead``."""

    # ==== as every branch ====

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        if plan.globals != plan.targets:
            raise MisuseError("with --targets momentum both branches see the same views: leave out --fresh")
        if plan.pair_weights.diagonal().any():
            raise MisuseError(
                "with --targets momentum a view that meets itself has nothing to learn: leave out --pairing, which is cross"
            )
        return ()

    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> "_CopyStream":
        return _CopyStream(self)

    # ==== beside the training ====

    def follow(self, model: nn.Module, steps_per_epoch: int, epochs: int) -> None:
        """Start as ``model``, a StudentWithHead, is now. MisuseError: a queue is asked for that never serves."""
        start = self.config.queue_from_epoch
        if self.queue is not None and epochs <= start:
            raise MisuseError(
                f"--queue {self.queue}: without a teacher it begins to fill in epoch {start}, and the last of --epochs {epochs} "
                f"is {epochs - 1}: leave --queue out, or train longer"
            )
        self.model, self.steps_per_epoch, self.total_steps = model, steps_per_epoch, steps_per_epoch * epochs
        if self.config.momentum is None:
            return
        self.copy = deepcopy(model).requires_grad_(False)
        for name in ("queue", "centres"):  # the student's objective gathers, the copy only embeds
            if hasattr(self.copy.objective, name):
                delattr(self.copy.objective, name)
        for module in self.copy.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0

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
        for centre in getattr(self.model.objective, "centres", ()):
            if isinstance(centre, SinkhornCentre):
                centre.queueing = epoch >= self.config.queue_from_epoch

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the copy towards the student; BatchNorm's statistics are its own."""
        if self.copy is None:
            return
        momentum = self.momentum(step)
        for slow, fast in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            slow.mul_(momentum).add_(fast, alpha=1 - momentum)

    def teacher_temp(self, epoch: int) -> float:
        """DINO's schedule: equal steps from epoch 0, the last value at the end of the warm-up. It only ever rises: a sharper last
        value holds from the start.
        """
        config = self.config
        if epoch >= config.warmup_teacher_temp_epochs:
            return config.teacher_temp
        share = epoch / max(1, config.warmup_teacher_temp_epochs - 1)
        first = min(config.warmup_teacher_temp, config.teacher_temp)
        return first + share * (config.teacher_temp - first)

    def momentum(self, step: int) -> float:
        """From the first value at step 0 towards the last: DINO's cosine, or MSN's line."""
        start, end = self.config.momentum, self.config.momentum_end
        assert start is not None
        done = step / (self.total_steps * self.config.momentum_runs)
        left = 1 - done if self.config.linear_momentum else 0.5 * (1 + math.cos(math.pi * done))
        return end + (start - end) * left

    @torch.no_grad()
    def embed(self, crops: Tensor) -> Target | None:
        """What the copy says of the student's global crops (B, G, 3, S, S); None leaves it to the student."""
        if self.copy is None:
            return None
        with autocast(self.device, self.precision):
            embedding = self.copy.objective.embed(self.copy.backbone(crops.flatten(0, 1)).unflatten(0, crops.shape[:2]))
        source = self.model if self.own_prototypes else self.copy
        prototypes = getattr(source.objective, "prototypes", None)
        matrix = embedding.new_empty(0, embedding.shape[2]) if prototypes is None else prototypes.matrix().detach()
        return EmbeddingTarget(embedding, matrix)


class _CopyStream:
    def __init__(self, branch: MomentumBranch) -> None:
        self.branch = branch

    def __enter__(self) -> "_CopyStream":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def next(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target | None:
        return self.branch.embed(crops[0])
