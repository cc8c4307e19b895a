"""SimReg (2201.05131): ``embedding`` with a deeper head, which is thrown away after training as every head is.

The head is a projector and a predictor, D-hidden(BatchNorm, ReLU)-D and D-hidden(BatchNorm, ReLU) to the teacher's dimension,
four linear layers with nothing between the second and the third; hidden is twice D in the paper (``UCDvision/simreg``).
Student and teacher see the same view, one a step; the teacher's embedding is its pooled feature.
"""

from torch import nn

from ...common.heads import ProjectionHead
from .embedding import EmbeddingObjective


class SimregObjective(EmbeddingObjective, name="simreg"):
    """The embedding objective behind four layers."""

    target_views = 1

    def build_head(self, num_features: int, hidden_dim: int, dim: int, norm: bool) -> ProjectionHead:
        projector = super().build_head(num_features, hidden_dim, num_features, norm)
        head = super().build_head(num_features, hidden_dim, dim, norm)
        head.mlp = nn.Sequential(*projector.mlp, *head.mlp)
        return head
