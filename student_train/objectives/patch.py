"""Regression of the teacher's patch tokens beside its embedding, as RADIO (2312.06709) and Theia have it.

    L = L_embedding + w * mean over pairs and positions of .9 (1 - cos(s, t)) + .1 smooth-L1(s, t)

t is a token of the cached grid, s the student's map at that place, through one linear layer a position. A global crop meets the
grid of its own view, position by position: its map is averaged down to the grid where it is larger, interpolated where it is
smaller. With ``patch_from_region`` a local crop meets every target's region that it shows, at the positions of its own map that
are wholly inside. The weights .9 and .1 are RADIO's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import MisuseError
from ..kernels.target import EmbeddingTarget, widened
from ..targets.dense import TargetWithPatches, align_regions
from .embedding import EmbeddingObjective
from .objective import ObjectiveContext

COSINE, SMOOTH_L1 = 0.9, 0.1
EPS = 1e-6
"""Added to the variance of a token that is standardised."""


class PatchObjective(EmbeddingObjective, name="patch"):
    """The student's embedding regresses the teacher's, and each position of its map the teacher's token there."""

    options = EmbeddingObjective.options | {"patch_weight", "patch_standardise", "patch_layer", "patch_from_region"}
    patch_kinds = ("grid",)

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        config, space, student = context.config, context.space.patches, context.student_map
        self.patch_weight = 1.0 if config.patch_weight is None else config.patch_weight
        self.patch_layer, self.standardise = config.patch_layer, bool(config.patch_standardise)
        self.from_region = bool(config.patch_from_region)
        if not self.patch_weight:
            return
        if space is None or space.kind != "grid":
            found = "targets without patches" if space is None else f"`patches` {space.kind}"
            raise MisuseError(
                f"`objective` patch compares patch tokens, and these are {found}: cache with `patches` grid, or use embedding"
            )
        assert student is not None
        self.grid = space.grid
        self.projector = nn.Linear(student.width, space.dim)

    def patch_loss(self, maps: Sequence[Tensor], hidden: Tensor | None, target: TargetWithPatches) -> Tensor:
        """Mean over the pairs that have positions in common, of the mean over those."""
        assert isinstance(target.patches, EmbeddingTarget)
        wanted = target.patches.embedding
        wanted = wanted.to(widened(wanted.dtype)).unflatten(1, (target.pooled.num_views, -1))  # (B, G, P, C)
        if self.standardise:
            wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=EPS)
        placement = target.placement
        total = pairs = wanted.new_zeros(())
        if own := placement.plan.num_replayed:
            said = resampled(self.project(maps[0][:, :own]), self.grid).flatten(3).mT
            apart = distance(said, wanted[:, :own]).mean(2)
            total, pairs = total + apart.sum(), pairs + apart.numel()
        if self.from_region and placement.plan.locals:
            said = self.project(maps[1])  # (B, L, C, h, w)
            tokens = wanted.mT.unflatten(3, (self.grid, self.grid))
            found, inside = align_regions(tokens, placement.regions(), said.shape[-1])
            apart = distance(said[:, :, None].movedim(3, -1).expand_as(found.movedim(3, -1)), found.movedim(3, -1))
            shared = inside.sum((3, 4))
            by_pair = torch.where(inside, apart, 0).sum((3, 4)) / shared.clamp(min=1)
            # To choose those that share something would be to wait for the GPU; the others are 0.
            total, pairs = total + by_pair.sum(), pairs + (shared > 0).sum()
        return total / pairs.clamp(min=1)

    def project(self, maps: Tensor) -> Tensor:
        """(B, n, C, h, w) to (B, n, dim, h, w), float32 or wider."""
        said = self.projector(maps.movedim(2, -1)).movedim(-1, 2)
        return said.to(widened(said.dtype))


def resampled(maps: Tensor, grid: int) -> Tensor:
    """(B, n, C, h, w) to (B, n, C, grid, grid): means of areas where there are fewer positions then, else bilinear."""
    flat = maps.flatten(0, 1)
    if maps.shape[-1] >= grid:
        found = F.adaptive_avg_pool2d(flat, grid)
    else:
        found = F.interpolate(flat, size=(grid, grid), mode="bilinear", align_corners=False)
    return found.unflatten(0, maps.shape[:2])


def distance(said: Tensor, wanted: Tensor) -> Tensor:
    """(..., C) and (..., C) to (...)."""
    with torch.autocast(said.device.type, enabled=False):
        smooth = F.smooth_l1_loss(said, wanted, reduction="none").mean(-1)
        return COSINE * (1 - F.cosine_similarity(said, wanted, dim=-1)) + SMOOTH_L1 * smooth
