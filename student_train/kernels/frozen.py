"""What is worth computing once of a matrix that does not change: a frozen teacher's prototypes, batch after batch."""

from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor


@dataclass
class _Kept:
    """Of one tensor, until it changes or goes."""

    of: "ref[Tensor]"
    version: int
    casts: dict[torch.dtype, Tensor] = field(default_factory=dict)
    norm: Tensor | None = None


_kept: dict[int, _Kept] = {}


def _entry(matrix: Tensor) -> _Kept | None:
    """None for what may change unnoticed, or is on its way to a gradient."""
    if matrix.requires_grad or matrix.is_inference():
        return None
    found = _kept.get(id(matrix))
    if found is None or found.of() is not matrix or found.version != matrix._version:
        key = id(matrix)
        found = _kept[key] = _Kept(ref(matrix, lambda gone: _forget(key, gone)), matrix._version)
    return found


def _forget(key: int, gone: "ref[Tensor]") -> None:
    if key in _kept and _kept[key].of is gone:
        del _kept[key]


def cast_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` in ``dtype``, contiguous; the same tensor again while ``matrix`` lives and is not written to."""
    kept = _entry(matrix)
    if kept is None:
        return matrix.detach().to(dtype).contiguous()
    if dtype not in kept.casts:
        made = matrix.to(dtype).contiguous()
        if made is matrix:  # else it would keep itself alive
            return matrix
        kept.casts[dtype] = made
    return kept.casts[dtype]


def largest_norm(matrix: Tensor) -> Tensor:
    """() float32 length of the longest row, kept likewise."""
    kept = _entry(matrix)
    if kept is not None and kept.norm is not None:
        return kept.norm
    norm = torch.linalg.vector_norm(matrix.detach(), dim=1, dtype=torch.float32).max()
    if kept is not None:
        kept.norm = norm
    return norm
