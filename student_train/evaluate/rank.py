"""RankMe (Garrido et al. 2022, 2210.02885): how many directions the embeddings fill, which needs no labels."""

import torch
from torch import Tensor

EPSILON = 1e-7


def rank_me(rows: Tensor) -> float:
    """The effective rank of embeddings (N, D): exp of the entropy of their singular values, from 1 (collapsed) to min(N, D)."""
    values = torch.linalg.svdvals(rows.float())
    shares = values / values.sum().clamp_min(EPSILON) + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))
