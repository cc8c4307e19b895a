"""MSN's term (2204.07141, eq. 2): the entropy of the mean prediction, to be maximised so that all prototypes get used."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .target import widened

CHUNK_BYTES = 64 << 20
"""Bytes of logits to hold at once; more rows go in chunks whose softmax the backward pass computes again."""


def mean_entropy(
    student_embedding: Tensor,
    prototypes: Tensor,
    temp: float,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """H(mean over rows of softmax((student_embedding prototypes^T + bias) / temp)) in nats, at most log K.

    student_embedding: (..., D); prototypes: (K, D); bias: (K,). All get a gradient. ``mean_over_ranks`` takes a rank's mean
    (K,) to that over all ranks. Accumulated in float32 or wider, whatever autocast says.
    """
    dtype = widened(torch.promote_types(student_embedding.dtype, prototypes.dtype))
    with torch.autocast(student_embedding.device.type, enabled=False):
        rows, matrix = student_embedding.flatten(0, -2).to(dtype), prototypes.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        chunks = rows.split(max(1, CHUNK_BYTES // (len(matrix) * dtype.itemsize)))
        if len(chunks) == 1:
            total = _sum_of_softmax(rows, matrix, bias, temp)
        else:
            again = partial(checkpoint, _sum_of_softmax, use_reentrant=False, preserve_rng_state=False)
            total = torch.stack([again(chunk, matrix, bias, temp) for chunk in chunks]).sum(0)  # pyright: ignore
        mean = total / len(rows)
        if mean_over_ranks is not None:
            mean = mean_over_ranks(mean)
        return -(mean * mean.clamp_min(torch.finfo(dtype).tiny).log()).sum()


def _sum_of_softmax(rows: Tensor, prototypes: Tensor, bias: Tensor | None, temp: float) -> Tensor:
    return torch.softmax(F.linear(rows, prototypes, bias) / temp, dim=1).sum(0)
