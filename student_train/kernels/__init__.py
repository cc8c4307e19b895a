"""The losses over prototypes, and the targets they take. Imports only torch and triton."""

from .entropy import mean_entropy
from .prototype_ce import prototype_cross_entropy
from .sinkhorn import Offsets, sinkhorn_offsets
from .target import DenseTarget, EmbeddingTarget, Target, TopKTarget

__all__ = [
    "DenseTarget",
    "EmbeddingTarget",
    "Offsets",
    "Target",
    "TopKTarget",
    "mean_entropy",
    "prototype_cross_entropy",
    "sinkhorn_offsets",
]
