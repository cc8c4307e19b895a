"""The student and its objective as one module."""

from copy import deepcopy

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .kernels.target import Target
from .objectives import Objective
from .targets.pair import PairTarget


class StudentWithHead(nn.Module):
    """The student and its objective (which owns the head) as one module: one optimiser, one checkpoint."""

    def __init__(self, backbone: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.backbone, self.objective = backbone, objective

    def forward(self, crops: list[Tensor], target: Target | PairTarget | None, pair_weights: Tensor) -> Tensor:
        """crops: one (B, n, 3, S, S) tensor a crop size. Each size is one forward pass."""
        features = [self.features(views) for views in crops]
        return self.objective(torch.cat(features, dim=1), target, pair_weights)

    def features(self, views: Tensor) -> Tensor:
        """Of the backbone: (B, n, 3, S, S) -> (B, n, F)."""
        return self.backbone(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    def copy_for_targets(self) -> "StudentWithHead":
        """A copy that only embeds: it is not trained, gathers nothing and drops no path."""
        copy = StudentWithHead(deepcopy(self.backbone), self.objective.copy_for_targets())
        for module in copy.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return copy.train(self.training).requires_grad_(False)
