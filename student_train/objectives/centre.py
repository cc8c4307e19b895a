"""What is taken off the teacher's logits before its softmax, so that no few prototypes take all images.

==============  ===============================================================  ============================
none            nothing
checkpoint      the running mean that the teacher ended its own training with    DINO, 2104.14294, eq. 4
calibration     the teacher's mean logits over all cached views                  the same, of these images
running         the mean of this run's own targets, c <- .9 c + .1 mean(t)       DINO, 2104.14294, eq. 4
Sinkhorn        what evens out the prototypes' use over a batch, or a queue too  SwAV, 2006.09882, section 3.1
==============  ===============================================================  ============================

All are a vector (K,): Sinkhorn's too, since its scaling of the rows is what a softmax does anyway (``kernels.sinkhorn``).
A centre is a module ``(target, teacher_temp) -> (K,) or None``; what it has gathered is part of the checkpoint.
"""

import torch
from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.ranks import current_ranks, mean_over_ranks
from ..kernels.sinkhorn import over_ranks, sinkhorn_offsets
from ..kernels.target import DenseTarget, EmbeddingTarget, Target, TopKTarget
from ..targets.space import TargetSpace
from .queue import Queue

CENTRE_MOMENTUM = 0.9
SINKHORN_ITERATIONS = 3
"""SwAV's, MSN's and RoB's."""


class FixedCentre(nn.Module):
    """The same centre (K,) in every step, or none. Of the teacher, not of the student: no part of the checkpoint."""

    centre: Tensor | None

    def __init__(self, centre: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("centre", centre, persistent=False)

    def forward(self, target: Target, teacher_temp: float) -> Tensor | None:
        return self.centre


class RunningCentre(nn.Module):
    """DINO's: the exponential mean of the targets' logits over steps, starting at 0. A step uses it before adding to it."""

    centre: Tensor

    def __init__(self, num_prototypes: int, momentum: float = CENTRE_MOMENTUM) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, target: Target, teacher_temp: float) -> Tensor:
        centre = self.centre
        mean = mean_over_ranks(_mean_logits(target)).to(centre.dtype)
        self.centre = self.momentum * centre + (1 - self.momentum) * mean
        return centre


class SinkhornCentre(nn.Module):
    """Sinkhorn-Knopp over the batch of all ranks, and over a ``queue`` of earlier targets too once it is full.

    ``start`` is that of ``sinkhorn_offsets``. While ``queueing`` is False the queue neither serves nor fills.
    """

    queueing = True

    def __init__(
        self, queue: Queue | None = None, iterations: int = SINKHORN_ITERATIONS, start: str = "exponentials"
    ) -> None:
        super().__init__()
        self.queue, self.iterations, self.start = queue, iterations, start

    @torch.no_grad()
    def forward(self, target: Target, teacher_temp: float) -> Tensor:
        assert isinstance(target, EmbeddingTarget | DenseTarget)
        rows = target.embedding if isinstance(target, EmbeddingTarget) else target.logits
        balanced, ranks = rows.flatten(0, 1), current_ranks()
        if self.queue is not None and self.queueing:
            if self.queue.full:  # each rank takes its share of the one queue
                balanced = torch.cat([balanced, self.queue.rows[ranks.rank :: ranks.world_size].to(rows.dtype)])
            self.queue.push(rows)
        offsets = sinkhorn_offsets(
            _with_rows(target, balanced.unsqueeze(1)),
            teacher_temp,
            self.iterations,
            over_ranks if ranks.world_size > 1 else None,
            self.start,
        )
        return offsets.centre


def build_centre(name: str, space: TargetSpace) -> nn.Module:
    """The centre called ``name``. MisuseError: these targets do not bring what it needs."""
    if name == "none":
        return FixedCentre()
    if name == "running":
        _check_all_logits("`centre_targets` running", space)
        return RunningCentre(space.num_prototypes)
    centre = space.centre if name == "checkpoint" else space.mean_logits
    if centre is None:
        cause = (
            "the teacher's file has to bring, and this one's does not: use calibration, running or none"
            if name == "checkpoint"
            else "only a store knows: use running or none, or cache the targets"
        )
        raise MisuseError(f"`centre_targets` {name} is a mean of the teacher's logits that {cause}")
    return FixedCentre(centre)


def build_sinkhorn(space: TargetSpace, start: str, queue_rows: int | None, iterations: int) -> SinkhornCentre:
    """Sinkhorn, ``iterations`` (1 or more) over the batch and a queue of ``queue_rows``, if any. MisuseError: the store has not
    all logits."""
    _check_all_logits("`sinkhorn`", space)
    width = space.dim if space.has_embedding else space.num_prototypes
    return SinkhornCentre(None if queue_rows is None else Queue(queue_rows, width), iterations, start)


def _check_all_logits(option: str, space: TargetSpace) -> None:
    if not space.has_all_logits:
        raise MisuseError(
            f"{option} needs all the teacher's logits, but the store holds the top k: cache with `encoding` embedding or "
            "dense, or use `sinkhorn` none and `centre_targets` calibration"
        )


def _with_rows(target: EmbeddingTarget | DenseTarget, rows: Tensor) -> EmbeddingTarget | DenseTarget:
    return EmbeddingTarget(rows, target.prototypes) if isinstance(target, EmbeddingTarget) else DenseTarget(rows)


def _mean_logits(target: Target) -> Tensor:
    """(K,) over this rank's images and views."""
    assert not isinstance(target, TopKTarget)
    if isinstance(target, DenseTarget):
        return target.logits.float().mean((0, 1))
    with torch.autocast(target.device.type, enabled=False):
        return target.matrix @ target.embedding.to(target.matrix.dtype).mean((0, 1))
