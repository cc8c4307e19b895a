"""Sinkhorn-Knopp on the target's logits, as an offset a prototype: what SwAV, MSN and DINOv2/v3 put in the centre's place.

SwAV's iteration brings the matrix exp(t / temp) of R rows and K prototypes to equal sums, prototypes first, rows last. In
logarithms the result is ``q = exp(t / temp + row + column)``. As every row of q sums to one, ``row`` is what a softmax
would subtract anyway, and the loss needs the columns only, which act as a centre: ``q = softmax((t - centre) / temp)``
with ``centre = -temp * column``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .target import DenseTarget, EmbeddingTarget, widened


@dataclass(frozen=True, eq=False)
class Offsets:
    """column: (K,) in float32 or wider, with q = softmax(t / temp + column)."""

    column: Tensor
    temp: float

    @property
    def centre(self) -> Tensor:
        """(K,), for prototype_cross_entropy at ``teacher_temp=self.temp``."""
        return -self.temp * self.column


STARTS = ("exponentials", "probabilities")

TILE = 8192
"""Prototypes to visit at a time. The same on every rank, since each tile is a collective."""


@torch.no_grad()
def sinkhorn_offsets(
    target: EmbeddingTarget | DenseTarget,
    temp: float,
    iterations: int = 3,
    log_sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    start: str = "exponentials",
) -> Offsets:
    """The offsets after ``iterations`` rounds (SwAV, arXiv 2006.09882, appendix A: 3 at temp 0.05).

    Each round visits the prototypes in tiles, so that the logits of all rows by all prototypes never exist, unless they
    are the target. A queue's rows are further images of the target: leave them out of the loss, not of this.

    log_sum_over_ranks: given this rank's (K,) log-sum-exp over its rows, returns that over all ranks' rows;
        ``over_ranks`` does. None where one rank holds the whole batch.
    start: "exponentials" iterates on exp(t / temp) as SwAV does, "probabilities" on softmax(t / temp) as MSN does
        (2204.07141), where an image that is near no prototype counts as much as any other from the first round on.

    Raises ValueError for a top-k target, whose rows are not known well enough to balance, for an unknown start, and
    unless temp > 0 and iterations >= 1.
    """
    if not isinstance(target, EmbeddingTarget | DenseTarget):
        raise ValueError("Sinkhorn needs all the logits: cache the targets as embedding or dense, not topk")
    if not temp > 0 or iterations < 1:
        raise ValueError(f"Sinkhorn needs a positive temperature and at least one iteration, got {temp}, {iterations}")
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r} of Sinkhorn; known: {', '.join(STARTS)}")
    k = target.num_prototypes
    tiles = [slice(first, min(first + TILE, k)) for first in range(0, k, TILE)]
    with torch.autocast(target.device.type, enabled=False):
        row = _logits(target, slice(0, 1)).squeeze(1).zero_()
        column = row.new_empty(k)
        if start == "probabilities":
            row = -torch.stack([torch.logsumexp(_logits(target, tile) / temp, dim=1) for tile in tiles]).logsumexp(0)
        for _ in range(iterations):
            # One pass over the prototypes does both halves: a tile's columns need all rows, but only their own tile.
            log_sum = torch.full_like(row, -torch.inf)
            for tile in tiles:
                logits = _logits(target, tile).div_(temp)
                over_rows = torch.logsumexp(logits + row.unsqueeze(1), dim=0)
                column[tile] = -(over_rows if log_sum_over_ranks is None else log_sum_over_ranks(over_rows))
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(logits.add_(column[tile]), dim=1))
            row = -log_sum
    return Offsets(column, temp)


def _logits(target: EmbeddingTarget | DenseTarget, tile: slice) -> Tensor:
    """(B * G, width) logits at a tile of prototypes, a fresh tensor in float32 or wider."""
    if isinstance(target, DenseTarget):
        logits = target.logits[..., tile].flatten(0, 1)
        return logits.to(widened(logits.dtype), copy=True)
    embedding, prototypes = target.embedding.flatten(0, 1), target.matrix[tile]
    dtype = widened(torch.promote_types(embedding.dtype, prototypes.dtype))
    return embedding.to(dtype) @ prototypes.to(dtype).T


def over_ranks(log_sum: Tensor) -> Tensor:
    """log-sum-exp of a tensor over all ranks of the default process group; the same on every rank."""
    largest = log_sum.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    total = torch.exp(log_sum - largest)
    torch.distributed.all_reduce(total)
    return largest + total.log()
