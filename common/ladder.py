"""The ladder of temperatures at which a `topk` store keeps the weight of what it dropped, and the weight between its rungs."""

from math import prod

import torch
from torch import Tensor

from .errors import MisuseError

LADDER = (0.025, 0.04, 0.055, 0.07, 0.1)
"""Teacher temperatures: MSN's effective .025, DINO's .04 to .07, and SwAV's .1."""


def check_temperature(temps: tuple[float, ...], temp: float) -> None:
    """MisuseError where ``temp`` is outside of the ladder ``temps``, and the tail would be a guess."""
    if not min(temps) * 0.999 <= temp <= max(temps) * 1.001:
        raise MisuseError(
            f"teacher temperature {temp:g} is outside of the store's ladder {min(temps):g} to {max(temps):g}: "
            "take one within, or cache the targets again with --encoding embedding, which serves any"
        )


def tail_at(tail: Tensor, temps: tuple[float, ...], temp: float) -> Tensor:
    """The tail's log-sum-exp (...) at ``temp``, from its values (..., T) at the ladder ``temps``, in the tail's dtype.

    As a function of beta = 1 / temp it is smooth and convex (a log-partition function), so the polynomial in beta
    through all T points is exact on the ladder and close between: off by at most .004 from .04 to .1 and .07 below on a
    real teacher (worst tail error in benchmarks/store.py). A tail of -inf (K <= k) stays -inf. MisuseError as
    ``check_temperature``.
    """
    check_temperature(temps, temp)
    beta, ladder = 1 / temp, [1 / other for other in temps]
    weights = [prod((beta - other) / (own - other) for other in ladder if other != own) for own in ladder]
    mixed = (tail * tail.new_tensor(weights)).sum(-1)
    return torch.where(torch.isneginf(tail).any(-1), -torch.inf, mixed)
