"""Consistency of the final embedding: the distillation half of DisCo (2104.09124, section 3.3).

    L = sum_{v,g} w[v,g] * mean_b || z_s[b,v] - z_t[b,g] ||^2        with unit vectors z, so 2 - 2 cos(z_s, z_t)

Against the published code the sums over the batch and over the views are means, and the head has BatchNorm (``head_norm``
False: as there); ``disco`` has it as published. A centre subtracts the
teacher's mean embedding first: features after a ReLU share a large part that says nothing about the image.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import MisuseError
from ...common.heads import ProjectionHead
from ..collapse import spread
from ..kernels.target import EmbeddingTarget, Target, widened
from .objective import Objective, ObjectiveContext


class EmbeddingObjective(Objective, name="embedding"):
    """The student's projected embedding regresses the teacher's, view by view."""

    options = frozenset(("centre_targets",))
    pairing = "same"
    head_norm: ClassVar[bool] = True

    mean_embedding: Tensor | None

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        config, space = context.config, context.space
        if not space.has_embedding:
            raise MisuseError(
                f"`objective` {config.name} needs the teacher's embedding, but the store holds logits: "
                "cache with `encoding` embedding"
            )
        centre = config.centre_targets or "none"
        if centre not in ("none", "calibration"):
            raise MisuseError(
                f"`centre_targets` {centre} is a mean of logits, and `objective` {config.name} compares embeddings: "
                "use calibration or none"
            )
        if centre == "calibration" and space.mean_embedding is None:
            raise MisuseError(
                "`centre_targets` needs the teacher's mean embedding, which only a store has: leave it out, or cache"
            )
        self.register_buffer("mean_embedding", None if centre == "none" else space.mean_embedding, persistent=False)
        norm = self.head_norm if config.head_norm is None else config.head_norm
        self.head = self.build_head(context.num_features, config.hidden_dim, space.dim, norm)

    def build_head(self, num_features: int, hidden_dim: int, dim: int, norm: bool) -> ProjectionHead:
        """(N, num_features) -> (N, dim) unit rows."""
        return ProjectionHead(num_features, hidden_dim, dim, 2, "relu", norm)

    def wanted(self, target: Target | None) -> Tensor:
        """(B, G, D) unit rows in float32 or wider: the teacher's embedding, centred if asked."""
        assert isinstance(target, EmbeddingTarget)
        embedding = target.embedding.to(widened(target.embedding.dtype))
        if self.mean_embedding is not None:
            embedding = F.normalize(embedding - self.mean_embedding, dim=-1)
        if self.watching:
            self.targets_found = spread(embedding)
        return embedding

    def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target.embedding (B, G, D) unit rows; pair_weights (V, G)."""
        return consistency(self.embed(features), self.wanted(target), pair_weights)


def consistency(embedding: Tensor, wanted: Tensor, pair_weights: Tensor) -> Tensor:
    """sum_{v,g} pair_weights[v,g] mean_b |embedding[b,v] - wanted[b,g]|^2 of unit rows (B, V, D) and (B, G, D)."""
    with torch.autocast(embedding.device.type, enabled=False):  # 2 - 2 cos cancels: no bits to spare
        cosine = torch.einsum("bvd,bgd->vg", embedding, wanted) / len(embedding)
    return (pair_weights * (2 - 2 * cosine)).sum()
