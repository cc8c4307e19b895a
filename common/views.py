"""A view is a pure function of (recipe, seed, image id, view id).

Nothing about a view is ever stored: both stages draw its crop, flip and colour from a counter-based generator, so the
view that the teacher saw when its target was cached is the view that the student sees, on any machine, in any order,
with any number of workers.

View ids 0, 1, 2 ... are global crops, and the cached views are the first V of them; ids from ``LOCAL`` on are local
crops.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .errors import MisuseError, unknown_name

LOCAL = 1 << 30
"""View ids from here on are local crops; below, global ones."""

FLIP = 4
"""Column of ``ViewParameters.geometry`` that holds the flip; the four before it are top, left, height, width."""
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARISE = range(8)
"""Columns of ``ViewParameters.colour``."""


@dataclass(frozen=True)
class Crop:
    """How one kind of view is drawn. Probabilities are in [0, 1]; colour strengths are those of torchvision's ColorJitter.

    ``scale`` is the area of the crop as a fraction of the image, ``ratio`` its width over height (drawn log-uniformly). With
    ``centre`` > 0 the crop is not random but the centred square of that fraction of the shorter side. ``size`` is the side in
    pixels at which the paper renders the crop: blur radii refer to it, and it is the default output size.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    centre: float = 0.0
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarise", "centre"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise MisuseError(f"view option {name} is {getattr(self, name)}, expected a value from 0 to 1")
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise MisuseError(
                f"view option scale is {self.scale}, expected 0 < low <= high <= 1 (fractions of the image's area)"
            )
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise MisuseError(f"view option ratio is {self.ratio}, expected 0 < low <= high (width over height)")
        if not 0.0 <= self.hue <= 0.5 or min(self.brightness, self.contrast, self.saturation) < 0.0 or self.size < 1:
            raise MisuseError("view colour strengths must be at least 0 (hue at most 0.5) and sizes at least 1 px")

    def row(self) -> np.ndarray:
        """The crop as float64 values in field order, pairs flattened: what the compiled draw reads."""
        return np.array([x for f in fields(self) for x in np.atleast_1d(getattr(self, f.name))], dtype=np.float64)


@dataclass(frozen=True)
class Recipe:
    """A named way of drawing views: global crops (cycled through by view id: DINO's two differ) and local ones.

    ``num_global`` and ``num_local`` are the crops of an image in one step of the paper, which ``rob views`` draws; of the
    global ones a training takes as many as its targets want. ``global_weight`` is what the pairs of two global crops weigh of
    all (None: all pairs alike).
    """

    name: str
    global_crops: tuple[Crop, ...]
    local_crop: Crop | None = None
    num_global: int = 2
    num_local: int = 0
    global_weight: float | None = None

    def __post_init__(self) -> None:
        if self.num_global < 1 or self.num_local < 0:
            raise MisuseError(
                f"recipe {self.name}: needs at least 1 global and 0 local crops, got {self.num_global} and {self.num_local}"
            )
        if self.num_local and self.local_crop is None:
            raise MisuseError(
                f"recipe {self.name} has no local crop: leave out --num-local or take a recipe that has (dino, swav ...)"
            )

    def table(self) -> np.ndarray:
        """One row a kind of crop, the local kind last: (kinds + 1, fields) float64."""
        return np.stack([c.row() for c in (*self.global_crops, self.local_crop or self.global_crops[0])])

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """Undoes ``to_dict``, also after a way through JSON, which knows no tuples."""

        def crop(fields: dict[str, Any]) -> Crop:
            pairs: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            return Crop(**(fields | pairs))

        local = values["local_crop"]
        return cls(
            values["name"],
            tuple(crop(c) for c in values["global_crops"]),
            crop(local) if local else None,
            values["num_global"],
            values["num_local"],
            values.get("global_weight"),
        )


def _jitter(b: float, c: float, s: float, h: float) -> dict[str, Any]:
    return {"jitter": 0.8, "brightness": b, "contrast": c, "saturation": s, "hue": h, "grey": 0.2}


def _dino(
    global_scale: tuple[float, float], local_scale: tuple[float, float], local_size: int, **counts: float
) -> dict[str, Any]:
    """DINO's augmentations (also SSLight's): blur 1 / .1 / .5, solarise .2 on the second global crop."""
    colour = _jitter(0.4, 0.4, 0.2, 0.1)
    return {
        "global_crops": (
            Crop(224, global_scale, blur=1.0, **colour),
            Crop(224, global_scale, blur=0.1, solarise=0.2, **colour),
        ),
        "local_crop": Crop(local_size, local_scale, blur=0.5, **colour),
        **counts,
    }


def _swav(
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    local_size: int,
    strength: float,
    **counts: float,
) -> dict[str, Any]:
    """SwAV's augmentations (also MSN's, at half the colour strength): jitter .8/.8/.8/.2 times the strength, blur .5."""
    colour: dict[str, Any] = {"blur": 0.5, **_jitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)}
    return {
        "global_crops": (Crop(224, global_scale, **colour),),
        "local_crop": Crop(local_size, local_scale, **colour),
        **counts,
    }


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The multi-crop baseline of SSLight (2210.02808) for ViTs; its CNNs use scales .14-1 and .05-.14 and six local crops.
        Recipe("dino", **_dino((0.25, 1.0), (0.05, 0.25), 96, num_local=10)),
        # SSLight: less extreme ratios between the paired views, larger local crops, which weigh .6 instead of .91.
        Recipe("sslight", **_dino((0.3, 1.0), (0.05, 0.3), 128, num_local=10, global_weight=0.4)),
        Recipe("swav", **_swav((0.14, 1.0), (0.05, 0.14), 96, 1.0, num_local=6)),
        Recipe("sslight-swav", **_swav((0.3, 1.0), (0.05, 0.3), 128, 1.0, num_local=6, global_weight=0.4)),
        Recipe("msn", **_swav((0.3, 1.0), (0.05, 0.3), 96, 0.5, num_local=10)),
        # MoCo-v2 and DisCo: two crops of one kind.
        Recipe("moco-v2", (Crop(224, (0.2, 1.0), blur=0.5, **_jitter(0.4, 0.4, 0.4, 0.1)),)),
        Recipe("weak", (Crop(224, centre=0.875),), num_global=1),
    )
}


def evaluation_recipe(centre: float) -> Recipe:
    """The view that features are measured on: the centred square of ``centre`` of the shorter side, nothing else."""
    return Recipe("evaluation", (Crop(224, centre=centre, flip=0.0),), num_global=1)


@dataclass(frozen=True)
class RecipeOverrides:
    """What a user may change of a named recipe; None keeps the recipe's own value. ``colour`` scales all jitter strengths."""

    num_global: int | None = None
    num_local: int | None = None
    global_scale: tuple[float, float] | None = None
    local_scale: tuple[float, float] | None = None
    centre: float | None = None
    colour: float | None = None
    flip: float | None = None
    grey: float | None = None
    blur: float | None = None
    solarise: float | None = None


def get_recipe(name: str, overrides: RecipeOverrides | None = None) -> Recipe:
    """The named recipe with the overrides applied. Raises MisuseError for an unknown name or a value out of range."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    recipe, o = RECIPES[name], overrides or RecipeOverrides()

    def changed(crop: Crop, scale: tuple[float, float] | None) -> Crop:
        new = {k: v for k in ("flip", "grey", "blur", "solarise") if (v := getattr(o, k)) is not None}
        if scale is not None:
            new |= {"scale": tuple(scale), "centre": 0.0}
        if o.centre is not None:
            new |= {"centre": o.centre}
        if o.colour is not None:
            new |= {k: getattr(crop, k) * o.colour for k in ("brightness", "contrast", "saturation")}
            new |= {"hue": min(0.5, crop.hue * o.colour), "jitter": crop.jitter if o.colour else 0.0}
        return replace(crop, **new)

    return replace(
        recipe,
        global_crops=tuple(changed(c, o.global_scale) for c in recipe.global_crops),
        local_crop=changed(recipe.local_crop, o.local_scale) if recipe.local_crop else None,
        num_global=recipe.num_global if o.num_global is None else o.num_global,
        num_local=recipe.num_local if o.num_local is None else o.num_local,
    )


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
    geometry, colour = np.empty((len(images), 5), np.int32), np.empty((len(images), 8), np.float32)
    kinds = len(recipe.global_crops)
    _draw_views(recipe.table(), kinds, np.uint64(seed % 2**64), images, views, heights, widths, geometry, colour)
    shape = arrays[0].shape
    return ViewParameters(geometry.reshape(*shape, 5), colour.reshape(*shape, 8))


@njit(cache=True, nogil=True)
def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _key(seed, image_id, view_id):
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mix(np.uint64(seed) + golden)
    key = _mix(key ^ (np.uint64(image_id) * golden))
    return _mix(key + np.uint64(view_id) * golden)


@njit(cache=True, nogil=True)
def _uniform(key, counter, low, high):
    bits = _mix(key + np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15))
    return low + (high - low) * (np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0))


@njit(cache=True, nogil=True)
def _exp(x):
    """exp by its series: only + and *, so every machine draws the same crop (libm's exp differs in the last bit)."""
    term, total = 1.0, 1.0
    for n in range(1, 24):
        term *= x / n
        total += term
    return total


@njit(cache=True, nogil=True)
def _log(x):
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
    kind = kinds if view_id >= LOCAL else view_id % kinds
    row = table[kind]
    key = _key(seed, image_id, view_id)
    scale_low, scale_high, ratio_low, ratio_high, centre, flip = row[1], row[2], row[3], row[4], row[5], row[6]

    if centre > 0.0:
        side = max(1, int(np.floor(centre * min(height, width) + 0.5)))
        crop_height, crop_width = side, side
        top, left = (height - side) // 2, (width - side) // 2
    else:
        crop_height, crop_width, top, left = 0, 0, 0, 0
        for attempt in range(10):
            area = height * width * _uniform(key, 16 + 4 * attempt, scale_low, scale_high)
            ratio = _exp(_uniform(key, 17 + 4 * attempt, _log(ratio_low), _log(ratio_high)))
            w = int(np.floor(np.sqrt(area * ratio) + 0.5))
            h = int(np.floor(np.sqrt(area / ratio) + 0.5))
            if 0 < w <= width and 0 < h <= height:
                crop_height, crop_width = h, w
                top = int(_uniform(key, 18 + 4 * attempt, 0.0, height - h + 1.0))
                left = int(_uniform(key, 19 + 4 * attempt, 0.0, width - w + 1.0))
                break
        if crop_height == 0:  # no attempt fitted: the largest centred crop whose ratio is allowed
            crop_height, crop_width = height, width
            if width < ratio_low * height:
                crop_height = max(1, int(np.floor(width / ratio_low + 0.5)))
            elif width > ratio_high * height:
                crop_width = max(1, int(np.floor(height * ratio_high + 0.5)))
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
    geometry[0], geometry[1], geometry[2], geometry[3] = top, left, crop_height, crop_width
    geometry[4] = 1 if _uniform(key, 0, 0.0, 1.0) < flip else 0

    jitter, brightness, contrast, saturation, hue, grey = row[7], row[8], row[9], row[10], row[11], row[12]
    blur, sigma_low, sigma_high, solarise = row[13], row[14], row[15], row[16]
    colour[0], colour[1], colour[2], colour[3] = 1.0, 1.0, 1.0, 0.0
    colour[4] = np.floor(_uniform(key, 6, 0.0, 24.0))
    if _uniform(key, 1, 0.0, 1.0) < jitter:
        colour[0] = _uniform(key, 2, max(0.0, 1.0 - brightness), 1.0 + brightness)
        colour[1] = _uniform(key, 3, max(0.0, 1.0 - contrast), 1.0 + contrast)
        colour[2] = _uniform(key, 4, max(0.0, 1.0 - saturation), 1.0 + saturation)
        colour[3] = _uniform(key, 5, -hue, hue)
    colour[5] = 1.0 if _uniform(key, 7, 0.0, 1.0) < grey else 0.0
    colour[6] = _uniform(key, 9, sigma_low, sigma_high) if _uniform(key, 8, 0.0, 1.0) < blur else 0.0
    colour[7] = 1.0 if _uniform(key, 10, 0.0, 1.0) < solarise else 0.0
