"""RoB on MoCo-v2 (2301.09451's idea on 2003.04297): the student's query finds its image's key among a queue of others'.

    L = sum_{v,g} w[v,g] mean_b -log( e^{z_v.k_g / T} / (e^{z_v.k_g / T} + sum_n e^{z_v.n / T}) )

z is the student's embedding, k the teacher's of the same image, n the teacher's keys of earlier batches: 65536 of them, less
for a small data set. T is .2, the head D-2048-ReLU without BatchNorm to the teacher's dimension (MoCo-v2: 128).
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.target import Target
from .embedding import EmbeddingObjective
from .objective import ObjectiveContext
from .queue import Queue, queue_length
from .without_teacher import CopySettings

QUEUE_LENGTH = 65536
TEMPERATURE = 0.2


class MocoObjective(EmbeddingObjective, name="moco"):
    """InfoNCE against the teacher's keys."""

    options = frozenset(("student_temp", "centre_targets", "queue"))
    pairing = "cross"
    head_norm = False
    published = CopySettings(copy_momentum=0.999, momentum_end=0.999)

    queue: Queue | None

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        config = context.config
        self.student_temp = TEMPERATURE if config.student_temp is None else config.student_temp
        self.queue = Queue(queue_length(config.queue, QUEUE_LENGTH, context.num_images), context.space.dim)

    def copy_for_targets(self) -> Self:
        copy = super().copy_for_targets()
        copy.queue = None
        return copy

    def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target.embedding (B, G, D) unit rows; pair_weights (V, G)."""
        assert self.queue is not None, "a copy has no loss"
        keys = self.wanted(target)
        loss = info_nce(self.embed(features), keys, self.queue.rows, self.student_temp, pair_weights)
        self.queue.push(keys)
        return loss


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temp: float, pair_weights: Tensor) -> Tensor:
    """The loss above for unit rows: queries (B, V, D), keys (B, G, D), negatives (N, D), pair_weights (V, G)."""
    with torch.autocast(queries.device.type, enabled=False):
        positive = torch.einsum("bvd,bgd->bvg", queries, keys) / temp
        others = torch.logsumexp(queries @ negatives.T / temp, dim=-1, keepdim=True)
    return (pair_weights * F.softplus(others - positive).mean(0)).sum()  # -log(e^p / (e^p + e^o))
