"""Top-k targets: k probabilities and one shared by all other prototypes, so that nothing of width K is ever made.

The target is ``q_k = softmax((t - centre) / temp)`` with the K - k logits that the store dropped known only by their
log-sum-exp. Their joint mass is spread evenly over the prototypes that are not among the ids.
"""

import math

import torch
from torch import Tensor

from .target import TopKTarget, widened


def log_tail(target: TopKTarget, temp: float) -> Tensor:
    """(B, G) log-sum-exp of the dropped logits divided by ``temp``, read off the stored ladder.

    Log-sum-exp is convex in 1 / temp, and at 1 / temp = 0 it is log(K - k) whatever the logits. So that point joins the
    ladder and we interpolate linearly in 1 / temp, an upper bound between two points. Colder than the coldest point we
    go on along the last segment, a lower bound.
    """
    dropped = target.num_prototypes - target.ids.shape[2]
    tail = target.tail.to(widened(target.tail.dtype))
    if dropped == 0:
        return tail.new_full(tail.shape[:2], -math.inf)
    coldness = target.temps.to(tail.dtype).reciprocal()
    knots, order = torch.cat([coldness.new_zeros(1), coldness]).sort()
    values = torch.cat([tail.new_full((*tail.shape[:2], 1), math.log(dropped)), tail], dim=2)[..., order]
    right = torch.searchsorted(knots, knots.new_full((1,), 1 / temp)).clamp(1, knots.numel() - 1)
    left = right - 1
    share = (1 / temp - knots[left]) / (knots[right] - knots[left])
    low, high = values.index_select(2, left), values.index_select(2, right)
    return torch.lerp(low, high, share).squeeze(2)


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
