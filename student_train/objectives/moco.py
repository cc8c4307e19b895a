"""RoB on MoCo-v2 (2301.09451's idea on 2003.04297): the student's query finds its image's key among a queue of others'.

    L = sum_{v,g} w[v,g] mean_b -log( e^{z_v.k_g / T} / (e^{z_v.k_g / T} + sum_n e^{z_v.n / T}) )

z is the student's embedding, k the teacher's of the same image, n the teacher's keys of earlier batches: 65536 of them, less
for a small data set. T is .2, the head D-2048-ReLU without BatchNorm to the teacher's dimension (MoCo-v2: 128).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.target import Target
from .embedding import EmbeddingObjective
from .prototypes import given
from .queue import Queue, queue_length

if TYPE_CHECKING:
    from ..branches import TargetSpace
    from . import ObjectiveConfig

QUEUE_LENGTH = 65536
TEMPERATURE = 0.2


class MocoObjective(EmbeddingObjective):
    """InfoNCE against the teacher's keys."""

    options = frozenset(("student_temp", "centre", "queue"))
    head_norm = False

    def __init__(
        self,
        config: "ObjectiveConfig",
        num_features: int,
        space: "TargetSpace",
        targets: int = 2,
        num_images: int | None = None,
    ) -> None:
        """As ``build_objective``."""
        super().__init__(config, num_features, space)
        self.student_temp = given(config.student_temp, TEMPERATURE)
        self.queue = Queue(queue_length(config.queue, QUEUE_LENGTH, num_images), space.dim)

    def forward(self, features: Tensor, target: Target, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target.embedding (B, G, D) unit rows; pair_weights (V, G)."""
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
