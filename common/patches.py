"""The feature map of a network beside its pooled vector, and what a teacher's map becomes as patch targets.

Shapes: a map is (N, C, h, w); the rows of a grid are (N, P, C), P = grid x grid positions, row by row from the top left.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MisuseError
from .run import float64
from .store.patches import PatchEncoding

MEAN, BASIS, KEPT = "patch_mean", "patch_basis", "patch_variance"
"""Names, among a store's statistics, of a PCA's mean (C,), components (dim, C) and share of the variance."""
ROWS, CENTRE = "patch_prototypes", "patch_centre"
"""Of a teacher's patch prototypes (K, D), where they are not those of images, and of its patches' centre (K,)."""


def feature_map(network: nn.Module, features: Tensor, name: str = "the network") -> Tensor:
    """A timm network's ``forward_features``, whatever its layout, as a map (N, C, h, w).

    A ViT's patch tokens, behind its last norm, without class token and registers; a CNN's last stage. MisuseError: it has no map.
    """
    model: Any = network
    dims = features.ndim if isinstance(features, Tensor) else 0  # a few of timm's give a list, of several scales
    if dims == 4:
        return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
    if dims == 3:
        if not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity):
            features = model.fc_norm(features)  # those that pool the mean have their last norm behind it
        prefix = getattr(model, "num_prefix_tokens", int(getattr(model, "cls_token", None) is not None))
        tokens = features[:, prefix:]
        side = isqrt(tokens.shape[1])
        if side and side * side == tokens.shape[1]:
            return tokens.mT.unflatten(2, (side, side))
    raise MisuseError(f"{name} gives no square map of features, neither patch tokens nor a CNN's: do without `patches`")


def has_tokens(network: nn.Module) -> bool:
    """Whether its map is of patch tokens, as a ViT's is."""
    return getattr(network, "patch_embed", None) is not None


def grid_rows(features: Tensor, grid: int) -> Tensor:
    """A map (N, C, h, w) averaged to grid x grid positions, (N, P, C) float32."""
    return F.adaptive_avg_pool2d(features.float(), grid).flatten(2).mT


class PatchTargets:
    """A teacher's maps to rows as ``encoding`` stores them: (N, C, h, w) to (N, P, dim) float32, and those to their logits.

    ``head`` is the teacher's, whose rows meet the patch ``prototypes`` (K, D); ``statistics`` hold the PCA, if there is one.
    """

    def __init__(
        self,
        encoding: PatchEncoding,
        head: nn.Module | None,
        prototypes: Tensor | None,
        statistics: Mapping[str, np.ndarray],
        device: torch.device,
    ) -> None:
        self.encoding, self.head, self.prototypes = encoding, head, prototypes
        pca = [
            torch.from_numpy(np.asarray(statistics[name])).to(device) for name in (MEAN, BASIS) if name in statistics
        ]
        self.mean, self.basis = pca if pca else (None, None)

    @torch.no_grad()
    def rows(self, features: Tensor) -> Tensor:
        rows = grid_rows(features, self.encoding.grid)
        if self.encoding.kind == "grid":
            return rows if self.mean is None or self.basis is None else (rows - self.mean) @ self.basis.T
        return (
            F.normalize(rows, dim=-1)
            if self.head is None
            else self.head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        )

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        assert self.prototypes is not None
        return rows @ self.prototypes.T


def refuse_few_tokens(dim: int, tokens: int) -> None:
    """MisuseError: so many principal components cannot be found in so many tokens."""
    if tokens < dim:
        raise MisuseError(
            f"`patch_dim` {dim} is more components than can be found in {tokens:,} patch tokens: use a smaller one, 0 to keep "
            "tokens as they are, or more images"
        )


def fit_pca(batches: Iterable[Tensor], dim: int) -> dict[str, np.ndarray]:
    """The first ``dim`` principal components of rows (n, C), given batch by batch: mean (C,), orthonormal basis (dim, C), both
    float32, and their share of the variance, by the names above. MisuseError: fewer rows than components.
    """
    count, total, products = 0, None, None
    for batch in batches:
        rows = float64(batch)
        count += len(rows)
        total = rows.sum(0) if total is None else total + rows.sum(0)
        products = rows.T @ rows if products is None else products + rows.T @ rows
    refuse_few_tokens(dim, count)
    assert total is not None and products is not None
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    basis = vectors.flip(1)[:, :dim].T
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = basis * torch.sign(largest)  # a component's sign is arbitrary: the same on every machine
    kept = values.flip(0)[:dim].clamp(min=0).sum() / values.clamp(min=0).sum()
    return {
        MEAN: mean.float().cpu().numpy(),
        BASIS: basis.float().cpu().numpy(),
        KEPT: kept.cpu().numpy(),
    }
