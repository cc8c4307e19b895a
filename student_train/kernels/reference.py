"""The prototype losses, and the Triton kernels by their names, written plainly. Slow and large on purpose: the tests' truth."""

import math

import torch
from torch import Tensor

from .target import DenseTarget, EmbeddingTarget, Target, widened
from .topk import topk_probabilities


def wide(x: Tensor) -> Tensor:
    return x.to(widened(x.dtype))


def target_probabilities(target: Target, temp: float, centre: Tensor | None = None) -> Tensor:
    """(B, G, K) q = softmax((t - centre) / temp) in float32, or float64 for a float64 target."""
    match target:
        case EmbeddingTarget():
            logits = wide(target.embedding) @ wide(target.matrix).T
        case DenseTarget():
            logits = wide(target.logits)
        case _:
            at_ids, elsewhere = topk_probabilities(target, temp, centre)
            q = elsewhere.unsqueeze(2).repeat(1, 1, target.num_prototypes)
            return q.scatter(2, target.ids.long(), at_ids)
    if centre is not None:
        logits = logits - centre
    return torch.softmax(logits / temp, dim=2)


def prototype_cross_entropy(
    student_embedding: Tensor,  # (B, V, D)
    student_prototypes: Tensor,  # (K, D)
    target: Target,  # G views an image
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None,  # (K,)
    pair_weights: Tensor,  # (V, G) or (B, V, G)
    student_bias: Tensor | None = None,  # (K,)
) -> Tensor:
    """sum_{v,g} w[v,g] mean_b H(q[b,g], p[b,v]), p = softmax(student logits / student_temp)."""
    logits = wide(student_embedding) @ wide(student_prototypes).T
    if student_bias is not None:
        logits = logits + wide(student_bias)
    log_p = torch.log_softmax(logits / student_temp, dim=2)
    with torch.no_grad():
        q = target_probabilities(target, teacher_temp, centre).to(log_p.dtype)
    cross_entropy = -torch.einsum("bvk,bgk->bvg", log_p, q)
    return (pair_weights * cross_entropy).sum() / len(student_embedding)


def mean_entropy(student_embedding: Tensor, prototypes: Tensor, temp: float, bias: Tensor | None = None) -> Tensor:
    """Entropy in nats of one rank's mean prediction over all rows. student_embedding: (..., D); prototypes: (K, D); bias (K,)."""
    logits = wide(student_embedding).flatten(0, -2) @ wide(prototypes).T
    if bias is not None:
        logits = logits + wide(bias)
    p = torch.softmax(logits / temp, dim=1).mean(dim=0)
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()


def exponentials(
    query: Tensor, keys: Tensor, offset: Tensor | None, anchors: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """2^(s - anchor) and its sums over the prototypes, s = scale (query keys^T + offset). query (R, D); keys (K, D); offset (K,);
    anchors (R,)."""
    made = torch.exp2(_scaled(query @ keys.T, offset, scale) - anchors.unsqueeze(1))
    return made, made.sum(1)


def log_sum_exp(query: Tensor, keys: Tensor, offset: Tensor | None, scale: float) -> Tensor:
    """(R,) log2 of the sum of 2^s, as above."""
    return softmax_rows(query @ keys.T, offset, scale)[1]


def softmax_rows(logits: Tensor, offset: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """2^s over its sum, s = scale (logits + offset), and the sum's log2. logits (R, K); offset (K,)."""
    log_sums = torch.logsumexp(_scaled(logits, offset, scale) * math.log(2), dim=1) / math.log(2)
    return torch.exp2(_scaled(logits, offset, scale) - log_sums.unsqueeze(1)), log_sums


def _scaled(logits: Tensor, offset: Tensor | None, scale: float) -> Tensor:
    return scale * (logits if offset is None else logits + offset)
