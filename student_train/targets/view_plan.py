"""The views of one epoch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ViewPlan:
    """The view ids of one epoch: ``targets`` (G), the student's ``globals`` and ``locals`` (V together)."""

    targets: tuple[int, ...]
    globals: tuple[int, ...]
    locals: tuple[int, ...]
    pair_weights: Tensor
    """(V, G) float32, global crops first, summing to 1."""
    epoch: int = 0
