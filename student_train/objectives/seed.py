"""SEED (2101.04731, section 3): the student finds its image as alike to others as the teacher finds it.

    L = sum_{v,g} w[v,g] mean_b H( softmax([k_g.k_g, k_g.n] / tau_t), softmax([z_v.k_g, z_v.n] / tau_s) )

z is the student's embedding, k the teacher's of the same image, n the teacher's of earlier batches: the queue is ``moco``'s,
and the image's own k stands beside it, so that its similarity to itself (1) leads the target. tau_t is 1e-4, tau_s .2
(``jacobswan1/SEED``); student and teacher see the same view, one a step. Head: D-hidden-ReLU to the teacher's dimension
without BatchNorm, as MoCo-v2's; the paper's hidden layer is as wide as the student's features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.run import exact_products
from ..kernels.target import Target
from .moco import MocoObjective
from .objective import ObjectiveContext

TEACHER_TEMPERATURE = 1e-4


class SeedObjective(MocoObjective, name="seed"):
    """Cross-entropy of the similarities to the image's own key and to the queue."""

    options = MocoObjective.options | {"teacher_temp"}
    pairing, target_views, published = "same", 1, None

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.teacher_temp = context.config.teacher_temp or TEACHER_TEMPERATURE

    def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target.embedding (B, G, D) unit rows; pair_weights (V, G)."""
        assert self.queue is not None and self.teacher_temp is not None
        # What a store rounded is no unit row any more, and at such a temperature its similarity to itself has to be 1.
        keys = F.normalize(self.wanted(target), dim=-1)
        temps = self.student_temp, self.teacher_temp
        loss = similarity_cross_entropy(self.embed(features), keys, self.queue.rows, *temps, pair_weights)
        self.queue.push(keys)
        return loss


def similarity_cross_entropy(
    embedding: Tensor, keys: Tensor, others: Tensor, student_temp: float, teacher_temp: float, pair_weights: Tensor
) -> Tensor:
    """The loss above for unit rows: embedding (B, V, D), keys (B, G, D), others (N, D), pair_weights (V, G)."""
    with torch.autocast(embedding.device.type, enabled=False):
        with exact_products():  # what TF32 leaves out of a cosine is half of 1e-4, and that is the temperature
            similar = torch.cat([(keys * keys).sum(-1, keepdim=True), keys @ others.T], dim=-1)
        q_own, q_others = torch.softmax(similar / teacher_temp, dim=-1).split([1, len(others)], dim=-1)
        own = torch.einsum("bvd,bgd->bvg", embedding, keys) / student_temp
        to_others = embedding @ others.T / student_temp
        log_sum = torch.logaddexp(own, torch.logsumexp(to_others, dim=-1, keepdim=True))
        agreed = own * q_own.transpose(1, 2) + torch.einsum("bvn,bgn->bvg", to_others, q_others)
    return (pair_weights * (log_sum - agreed).mean(0)).sum()
