"""Targets of patches beside those of views, and where on the image each of them is.

The geometry of every view is drawn from (recipe, seed, image id, view id), so the place of each patch is known exactly: a
student's own view meets its own target position by position, and a local crop finds in a target the region that it shows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from ...common.views.drawing import CROP_HEIGHT, CROP_WIDTH, FLIP, LEFT, TOP, view_parameters
from ...common.views.planes import moved
from ...common.views.recipes import Recipe
from ..kernels.target import Target
from ..masks import block_masks
from .view_plan import ViewPlan

SAMPLES = 2
"""A side, that the mean over a position of a local crop is taken of."""


class Regions(NamedTuple):
    """Of B images, L local crops and G targets: where a local crop is in the target's view."""

    boxes: Tensor
    """(B, L, G, 4) float64: left, top, right, bottom in units of the target view's sides; outside of 0 to 1 where they are."""
    mirrored: Tensor
    """(B, L, G) bool: one of the two views is flipped, and the other is not."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the views of a batch are: B images ``image_ids`` of ``heights`` and ``widths``, and the views of ``plan``."""

    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    plan: ViewPlan
    recipe: Recipe
    seed: int

    def regions(self) -> Regions:
        """Of the local crops, in the targets' views."""
        local, target = (self._geometry(views) for views in (self.plan.locals, self.plan.targets))
        top, left, height, width = (local[:, :, None, n] for n in (TOP, LEFT, CROP_HEIGHT, CROP_WIDTH))
        of_top, of_left, of_height, of_width = (target[:, None, :, n] for n in (TOP, LEFT, CROP_HEIGHT, CROP_WIDTH))
        flipped = target[:, None, :, FLIP] > 0
        first, last = (left - of_left) / of_width, (left + width - of_left) / of_width
        first, last = np.where(flipped, 1 - last, first), np.where(flipped, 1 - first, last)
        above, below = (top - of_top) / of_height, (top + height - of_top) / of_height
        boxes = np.stack(np.broadcast_arrays(first, above, last, below), axis=-1)
        mirrored = (local[:, :, None, FLIP] > 0) != flipped
        return Regions(torch.from_numpy(boxes), torch.from_numpy(mirrored))

    def masks(self, side: int) -> Tensor:
        """(B, n, side, side) bool, on the CPU: which patches of the student's n global crops are hidden from it in this epoch."""
        return block_masks(self.seed, self.image_ids, np.array(self.plan.globals), self.plan.epoch, side)

    def _geometry(self, views: tuple[int, ...]) -> np.ndarray:
        """(B, n, 5) float64 of some view ids."""
        ids, sizes = self.image_ids[:, None], (self.heights[:, None], self.widths[:, None])
        drawn = view_parameters(self.recipe, self.seed, ids, np.array(views)[None], *sizes)
        return drawn.geometry.astype(np.float64)


@dataclass(frozen=True, eq=False)
class TargetWithPatches:
    """Of B images and G target views: ``pooled``, theirs, and ``patches``, of G * P "views": the P = grid x grid positions of
    each, row by row from the top left.
    """

    pooled: Target
    patches: Target
    placement: Placement


def align_regions(tokens: Tensor, regions: Regions, side: int) -> tuple[Tensor, Tensor]:
    """What ``tokens`` (B, G, C, g, g) of the targets' views say at the side x side positions of each local crop: (B, L, G, C,
    side, side), as that crop is turned, and (B, L, G, side, side) bool, whether a position is wholly within the target's view.
    """
    (images, crops, views), grid = regions.mirrored.shape, tokens.shape[-1]
    # In float64 on the CPU, where the regions are: not every device has it.
    view = torch.arange(images * views).view(images, 1, views, 1).expand(images, crops, views, 1)
    rois = torch.cat([view, regions.boxes * grid], dim=-1).flatten(0, 2).to(tokens.dtype)
    rois = moved(rois, tokens.device)
    found = roi_align(tokens.flatten(0, 1), rois, side, 1.0, SAMPLES, aligned=True)
    found = found.unflatten(0, (images, crops, views))
    left, top, right, bottom = regions.boxes.unbind(-1)
    columns, rows = (_inside(low, high, side) for low, high in ((left, right), (top, bottom)))
    inside, turned = rows[..., :, None] & columns[..., None, :], regions.mirrored[..., None, None]
    inside = moved(torch.where(turned, inside.flip(-1), inside), tokens.device)
    turned = moved(turned[..., None], tokens.device)
    return torch.where(turned, found.flip(-1), found), inside


def _inside(low: Tensor, high: Tensor, side: int) -> Tensor:
    """(..., side) bool: which of the equal parts from ``low`` to ``high`` are within 0 to 1."""
    edges = low[..., None] + (high - low)[..., None] * torch.linspace(
        0, 1, side + 1, dtype=low.dtype, device=low.device
    )
    return (edges[..., :-1] >= -1e-9) & (edges[..., 1:] <= 1 + 1e-9)
