"""How much of a teacher's full target survives storing, as the loss sees it."""

import torch
from torch import Tensor

from rob.common.store.codec import decode, encode
from rob.common.store.encodings import Encoding
from rob.student_train.kernels.reference import target_probabilities
from rob.student_train.kernels.target import Target
from rob.student_train.targets.cached import stored_target


def restored(encoding: Encoding, embedding: Tensor, prototypes: Tensor) -> Target:
    """Embeddings (R, V, D) float32 over ``prototypes`` (K, D), encoded and decoded again."""
    arrays = decode(encoding, encode(encoding, embedding, embedding @ prototypes.T))
    return stored_target(encoding, arrays, prototypes, len(prototypes))


def fidelity(
    encoding: Encoding, embedding: Tensor, prototypes: Tensor, temps: tuple[float, ...] = (0.04, 0.07)
) -> dict[str, float]:
    """Mean KL(full || stored) in nats a view at each of ``temps`` (keys ``kl_0.04`` ...) and ``top1_agreement``, the share of
    views whose most likely prototype stays the same. Full is softmax(embedding @ prototypes.T / temp); as ``restored``.
    """
    logits, target = embedding @ prototypes.T, restored(encoding, embedding, prototypes)
    measured = {}
    for temp in temps:
        log_p = torch.log_softmax(logits / temp, dim=-1)
        q = target_probabilities(target, temp)
        divergence = torch.special.xlogy(log_p.exp(), log_p.exp() / q.clamp_min(torch.finfo(q.dtype).tiny))
        measured[f"kl_{temp:g}"] = divergence.sum(-1).mean().item()
        measured["top1_agreement"] = (q.argmax(-1) == logits.argmax(-1)).float().mean().item()  # at any temperature
    return measured
