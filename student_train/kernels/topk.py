"""Top-k targets: k probabilities and one shared by all other prototypes, so that nothing of width K is ever made.

The target is ``q_k = softmax((t - centre) / temp)`` with the K - k logits that the store dropped known only by their
log-sum-exp. Their joint mass is spread evenly over the prototypes that are not among the ids.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .target import TopKTarget, widened


def log_tail(target: TopKTarget, temp: float) -> Tensor:
    """(B, G) log-sum-exp of the dropped logits divided by ``temp``, from its values at the target's ``temps``.

    As a function of beta = 1 / temp it is smooth and convex (a log-partition function), so the polynomial in beta
    through all T points is exact at them and close between: off by at most .004 from .04 to .1 and .07 below on a real
    teacher (worst tail error in benchmarks/store.py). Outside of them it would be a guess: ValueError.
    """
    tail, temps = target.tail.to(widened(target.tail.dtype)), target.temps
    if target.num_prototypes == target.ids.shape[2]:
        return tail.new_full(tail.shape[:2], -math.inf)
    if not min(temps) * 0.999 <= temp <= max(temps) * 1.001:
        raise ValueError(f"temperature {temp:g} is outside of the target's {min(temps):g} to {max(temps):g}")
    beta, points = 1 / temp, [1 / other for other in temps]
    weights = [math.prod((beta - other) / (own - other) for other in points if other != own) for own in points]
    return (tail * _on_device(tuple(weights), tail.dtype, tail.device)).sum(2)


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied there once: a copy in every step would have the host wait for the device each time."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def topk_probabilities(target: TopKTarget, temp: float, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, G, k) probabilities of the ids, and (B, G) the probability of each other prototype.

    A centre (K,) is exact at the ids. For the tail we subtract its mean over the dropped prototypes: on simulated
    teachers that is as close to the true target as anything a log-sum-exp can offer.
    """
    dropped = target.num_prototypes - target.ids.shape[2]
    dtype = widened(target.logits.dtype)
    top, tail = target.logits.to(dtype), log_tail(target, temp).to(dtype)
    if centre is not None:
        centre_at_ids = centre.to(dtype)[target.ids.long()]
        top = top - centre_at_ids
        tail = tail - (centre.to(dtype).sum() - centre_at_ids.sum(dim=2)) / (max(dropped, 1) * temp)
    joint = torch.cat([top / temp, tail.unsqueeze(2)], dim=2).softmax(dim=2)
    return joint[..., :-1], joint[..., -1] / max(dropped, 1)


def topk_means(ids: Tensor, at_ids: Tensor, elsewhere: Tensor, prototypes: Tensor) -> Tensor:
    """(B, G, D) float32 mean of the prototypes (K, D) under the target: k rows gathered, and one sum shared by all."""
    excess = at_ids - elsewhere.unsqueeze(2)
    gathered = torch.einsum("bgk,bgkd->bgd", excess, prototypes[ids.long()].to(excess.dtype))
    return gathered + elsewhere.unsqueeze(2) * prototypes.sum(0, dtype=excess.dtype)


def add_topk_gradient_(gradient: Tensor, ids: Tensor, at_ids: Tensor, elsewhere: Tensor, rows: Tensor) -> None:
    """gradient (K, D) += q^T rows, rows (B * G, D): the adjoint of topk_means."""
    excess = (at_ids - elsewhere.unsqueeze(2)).flatten(0, 1)
    gradient.index_add_(0, ids.long().flatten(), (excess.unsqueeze(2) * rows.unsqueeze(1)).flatten(0, 1))
    gradient.add_(elsewhere.flatten() @ rows)
