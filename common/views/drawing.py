"""The draw: what a view is, from (recipe, seed, image id, view id) and a counter-based generator, in compiled code.

View ids 0, 1, 2 ... are global crops, and the cached views are the first V of them; ids from ``LOCAL`` on are local
crops.
"""

from dataclasses import fields
from typing import NamedTuple

import numpy as np
from numba import njit

from .recipes import Crop, Recipe

LOCAL = 1 << 30
"""View ids from here on are local crops; below, global ones."""

GEOMETRY_COLUMNS, COLOUR_COLUMNS = 5, 8
TOP, LEFT, CROP_HEIGHT, CROP_WIDTH, FLIP = range(GEOMETRY_COLUMNS)
"""Columns of ``ViewParameters.geometry``."""
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARISE = range(COLOUR_COLUMNS)
"""Columns of ``ViewParameters.colour``."""
UNCHANGED = tuple(float(column in (BRIGHTNESS, CONTRAST, SATURATION)) for column in range(COLOUR_COLUMNS))
"""The row of ``ViewParameters.colour`` that leaves a view as it is."""


CROP = np.dtype([(f.name, np.float64, (2,) if isinstance(f.default, tuple) else ()) for f in fields(Crop)])
"""A crop as the compiled draw reads it, by the names of its fields. A draw compiled for other fields, or for another order
of them, is none of this type: numba compiles it anew instead of taking it from its cache on disk."""


class ViewParameters(NamedTuple):
    """What one draw decides.

    geometry: (..., 5) int32: top, left, height, width in pixels of the stored image, and flip (0 or 1).
    colour: (..., 8) float32: brightness, contrast and saturation factors (1 = unchanged), hue shift (turns, 0 = unchanged), order
    (0..23, which permutation of those four), grey (0 or 1), blur sigma in pixels at the crop's own size (0 = none), solarise
    (0 or 1).
    """

    geometry: np.ndarray
    colour: np.ndarray


def view_parameters(
    recipe: Recipe, seed: int, image_ids: np.ndarray, view_ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> ViewParameters:
    """The parameters of some views.

    The four arrays broadcast to one shape, which the results have before their last axis. Heights and widths are those
    of the stored images in pixels.
    """
    arrays = np.broadcast_arrays(image_ids, view_ids, heights, widths)
    images, views, heights, widths = (array.astype(np.int64).ravel() for array in arrays)
    geometry = np.empty((len(images), GEOMETRY_COLUMNS), np.int32)
    colour = np.empty((len(images), COLOUR_COLUMNS), np.float32)
    kinds = len(recipe.global_crops)
    _draw_views(crop_table(recipe), kinds, np.uint64(seed % 2**64), images, views, heights, widths, geometry, colour)
    shape = arrays[0].shape
    return ViewParameters(geometry.reshape(*shape, GEOMETRY_COLUMNS), colour.reshape(*shape, COLOUR_COLUMNS))


def crop_table(recipe: Recipe) -> np.ndarray:
    """The kinds of crop, the local one last: (kinds + 1,) of CROP."""
    crops = (*recipe.global_crops, recipe.local_crop or recipe.global_crops[0])
    return np.array([tuple(getattr(crop, name) for name in CROP.names or ()) for crop in crops], CROP)


@njit(cache=True, nogil=True)
def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def key_of(seed, image_id, view_id):
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(np.uint64(seed) + golden)
    key = _mix(key ^ (np.uint64(image_id) * golden))
    return _mix(key + np.uint64(view_id) * golden)


@njit(cache=True, nogil=True)
def uniform(key, counter, low, high):
    bits = _mix(key + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15))
    return low + (high - low) * (np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0))


@njit(cache=True, nogil=True)
def exp(x):
    """exp by its series: only + and *, so every machine draws the same crop (libm's exp differs in the last bit)."""
    term, total = 1.0, 1.0
    for n in range(1, 24):
        term *= x / n
        total += term
    return total


@njit(cache=True, nogil=True)
def log(x):
    """log by the series of atanh, for the same reason; good to 1e-12 for the ratios 1/4 to 4 that crops use."""
    z = (x - 1.0) / (x + 1.0)
    power, total = z, 0.0
    for n in range(1, 60, 2):
        total += power / n
        power *= z * z
    return 2.0 * total


@njit(cache=True, nogil=True)
def _draw_views(table, kinds, seed, image_ids, view_ids, heights, widths, geometry, colour):
    for i in range(len(image_ids)):
        _draw_view(table, kinds, seed, image_ids[i], view_ids[i], heights[i], widths[i], geometry[i], colour[i])


@njit(cache=True, nogil=True)
def _draw_view(table, kinds, seed, image_id, view_id, height, width, geometry, colour):
    """Fill ``geometry`` (5,) and ``colour`` (8,) for one view. The crop is torchvision's RandomResizedCrop.get_params."""
    crop = table[kinds if view_id >= LOCAL else view_id % kinds]
    key = key_of(seed, image_id, view_id)

    if crop.centre > 0.0:
        side = max(1, int(np.floor(crop.centre * min(height, width) + 0.5)))
        crop_height, crop_width = side, side
        top, left = (height - side) // 2, (width - side) // 2
    else:
        ratio_low, ratio_high = crop.ratio[0], crop.ratio[1]
        crop_height, crop_width, top, left = 0, 0, 0, 0
        for attempt in range(10):
            area = height * width * uniform(key, 16 + 4 * attempt, crop.scale[0], crop.scale[1])
            ratio = exp(uniform(key, 17 + 4 * attempt, log(ratio_low), log(ratio_high)))
            w = int(np.floor(np.sqrt(area * ratio) + 0.5))
            h = int(np.floor(np.sqrt(area / ratio) + 0.5))
            if 0 < w <= width and 0 < h <= height:
                crop_height, crop_width = h, w
                top = int(uniform(key, 18 + 4 * attempt, 0.0, height - h + 1.0))
                left = int(uniform(key, 19 + 4 * attempt, 0.0, width - w + 1.0))
                break
        if crop_height == 0:  # no attempt fitted: the largest centred crop whose ratio is allowed
            crop_height, crop_width = height, width
            if width < ratio_low * height:
                crop_height = max(1, int(np.floor(width / ratio_low + 0.5)))
            elif width > ratio_high * height:
                crop_width = max(1, int(np.floor(height * ratio_high + 0.5)))
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
    geometry[TOP], geometry[LEFT], geometry[CROP_HEIGHT], geometry[CROP_WIDTH] = top, left, crop_height, crop_width
    geometry[FLIP] = 1 if uniform(key, 0, 0.0, 1.0) < crop.flip else 0

    colour[BRIGHTNESS], colour[CONTRAST], colour[SATURATION], colour[HUE] = 1.0, 1.0, 1.0, 0.0
    colour[ORDER] = np.floor(uniform(key, 6, 0.0, 24.0))
    if uniform(key, 1, 0.0, 1.0) < crop.jitter:
        colour[BRIGHTNESS] = uniform(key, 2, max(0.0, 1.0 - crop.brightness), 1.0 + crop.brightness)
        colour[CONTRAST] = uniform(key, 3, max(0.0, 1.0 - crop.contrast), 1.0 + crop.contrast)
        colour[SATURATION] = uniform(key, 4, max(0.0, 1.0 - crop.saturation), 1.0 + crop.saturation)
        colour[HUE] = uniform(key, 5, -crop.hue, crop.hue)
    colour[GREY] = 1.0 if uniform(key, 7, 0.0, 1.0) < crop.grey else 0.0
    blurred = uniform(key, 8, 0.0, 1.0) < crop.blur
    colour[SIGMA] = uniform(key, 9, crop.sigma[0], crop.sigma[1]) if blurred else 0.0
    colour[SOLARISE] = 1.0 if uniform(key, 10, 0.0, 1.0) < crop.solarise else 0.0
