"""How different the two views of a training pair are in scale: what SSLight (2210.02808) found to matter for small networks."""

from typing import NamedTuple

import numpy as np

from ..views.drawing import CROP_HEIGHT, CROP_WIDTH, LOCAL, view_parameters
from ..views.recipes import Recipe


class PairRatios(NamedTuple):
    """Of every pair of a global view with another view of the same image, (pairs,) float64 each.

    area: the larger crop's area over the smaller one's, 1 or more: how much of what one view sees the other can see.
    magnification: by how much larger a thing appears in the view where it appears larger, 1 or more. That depends on the sizes
    in pixels of the views, too: a larger local view magnifies more.
    weight: its share of the loss over all these images, where both global views are targets of all other views.
    """

    area: np.ndarray
    magnification: np.ndarray
    weight: np.ndarray


def pair_ratios(recipe: Recipe, seed: int, heights: np.ndarray, widths: np.ndarray) -> PairRatios:
    """Of images 0 to n - 1 with ``heights`` and ``widths`` (n,) in pixels, with the recipe's own number of crops."""
    view_ids = np.concatenate([np.arange(recipe.num_global), LOCAL + np.arange(recipe.num_local)])
    local_size = recipe.local_crop.size if recipe.local_crop else recipe.global_crops[0].size
    sizes = np.where(view_ids < LOCAL, recipe.global_crops[0].size, local_size)
    image_ids = np.arange(len(heights))[:, None]
    drawn = view_parameters(recipe, seed, image_ids, view_ids[None], heights[:, None], widths[:, None])
    areas = drawn.geometry[..., CROP_HEIGHT].astype(float) * drawn.geometry[..., CROP_WIDTH]
    magnifications = sizes / np.sqrt(areas)
    pairs = [(g, v) for g in range(recipe.num_global) for v in range(len(view_ids)) if v > g]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T

    def ratios(values: np.ndarray) -> np.ndarray:
        ratio = values[:, left] / values[:, right]
        return np.maximum(ratio, 1 / ratio).ravel()

    # Two global views meet twice, each as the other's target.
    with_global = right < recipe.num_global
    weight = np.where(with_global, 2.0, 1.0)
    if recipe.global_weight is not None and recipe.num_local and recipe.num_global > 1:
        for kind, share in ((with_global, recipe.global_weight), (~with_global, 1 - recipe.global_weight)):
            weight[kind] = share / kind.sum()
    weight /= max(1.0, weight.sum()) * len(heights)
    return PairRatios(ratios(areas), ratios(magnifications), np.tile(weight, len(heights)))


def weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    """The smallest of ``values`` (n,), n > 0, at and below which lies half of ``weight`` (n,)."""
    order = np.argsort(values)
    below = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)])
