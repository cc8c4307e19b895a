"""Consistency of the final embedding: the distillation half of DisCo (2104.09124, section 3.3).

    L = sum_{v,g} w[v,g] * mean_b || z_s[b,v] - z_t[b,g] ||^2        with unit vectors z, so 2 - 2 cos(z_s, z_t)

Against the published code the sum over the batch is a mean: the loss does not grow with the batch. ``centre`` subtracts the
teacher's mean embedding first: features after a ReLU share a large part that says nothing about the image.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import MisuseError
from ...common.heads import ProjectionHead
from ..kernels.target import EmbeddingTarget, Target

if TYPE_CHECKING:
    from ..branches import TargetSpace
    from . import ObjectiveConfig


class EmbeddingObjective(nn.Module):
    """The student's projected embedding regresses the teacher's, view by view."""

    mean_embedding: Tensor | None

    def __init__(self, config: "ObjectiveConfig", num_features: int, space: "TargetSpace") -> None:
        super().__init__()
        if not space.has_embedding:
            raise MisuseError(
                "--objective embedding needs the teacher's embedding, but the store holds logits: cache with --encoding embedding"
            )
        if config.centre and space.mean_embedding is None:
            raise MisuseError(
                "--centre-targets needs the teacher's mean embedding, which only a store has: leave it out, or cache"
            )
        self.register_buffer("mean_embedding", space.mean_embedding if config.centre else None, persistent=False)
        self.head = ProjectionHead(
            num_features, config.hidden_dim, space.dim, num_layers=2, activation="relu", norm=config.head_norm
        )

    def forward(self, features: Tensor, target: Target, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target.embedding (B, G, D) unit rows; pair_weights (V, G)."""
        assert isinstance(target, EmbeddingTarget)
        embedding = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        towards = target.embedding.float()
        if self.mean_embedding is not None:
            towards = F.normalize(towards - self.mean_embedding, dim=-1)
        with torch.autocast(features.device.type, enabled=False):  # 2 - 2 cos cancels: no bits to spare
            cosine = torch.einsum("bvd,bgd->vg", embedding, towards) / len(features)
        return (pair_weights * (2 - 2 * cosine)).sum()
