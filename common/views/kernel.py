"""Planes to views on a GPU, in Triton: crop, antialiased resize, flip, colours and normalisation, each pixel written once.

A resize is two matrix products, ``down @ plane @ along.T``. The matrices hold the weights of the filters of ``resize.py``
(``triangle``, ``cubic``); they are banded, so a tile of a view needs only the part of the plane under it, and each weight
is made in registers where it is used. Bytes and weights fit float16, sums are float32. A blur has the same form, with
Gaussian weights that fold the reflected border back in.

Contrast needs the mean of the whole view in the middle of the colours. A view is many programs, so ``view_kernel`` runs
twice: first to leave each tile's grey sum, then to write. Reading the planes again, most of them still in the second-level
cache, costs at most 1.5 bytes times the square of the downscale a pixel; a view kept in between would cost 6 to 9.
What follows a blur waits for ``blur_kernel``: of those views only, the first kernel's result is kept, in float16.

Checked under Triton's interpreter and compiled for sm_80 and sm_90; not yet run on a GPU, and the tiles are not tuned.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import drawing
from . import planes as layouts
from .colours_compiled import ORDERS
from .kernel_filters import bell, box, cubic, cubic_box, filtered, gaussian, triangle
from .planes import Planes

TILE = 32
"""Side in pixels of the part of a view that one program makes: 224 and 96 are whole multiples."""
ROWS, COLUMNS = 32, 32
"""The part of a plane that is read at once."""
WARPS = 8
"""Of a program. With four, fewer fit a multiprocessor: twice the pixels a thread, and more registers than that costs."""

_YCC = tl.constexpr(layouts.YCC)
_KIND, _SCALE, _HEIGHT = tl.constexpr(layouts.KIND), tl.constexpr(layouts.SCALE), tl.constexpr(layouts.HEIGHT)
_WIDTH, _FACTOR_Y, _FACTOR_X = (
    tl.constexpr(layouts.WIDTH),
    tl.constexpr(layouts.FACTOR_Y),
    tl.constexpr(layouts.FACTOR_X),
)
_BRIGHTNESS, _CONTRAST = tl.constexpr(drawing.BRIGHTNESS), tl.constexpr(drawing.CONTRAST)
_SATURATION, _HUE, _ORDER = tl.constexpr(drawing.SATURATION), tl.constexpr(drawing.HUE), tl.constexpr(drawing.ORDER)
_GREY, _SIGMA, _SOLARISE = tl.constexpr(drawing.GREY), tl.constexpr(drawing.SIGMA), tl.constexpr(drawing.SOLARISE)
_TOP, _LEFT, _FLIP = tl.constexpr(drawing.TOP), tl.constexpr(drawing.LEFT), tl.constexpr(drawing.FLIP)
_CROP_HEIGHT, _CROP_WIDTH = tl.constexpr(drawing.CROP_HEIGHT), tl.constexpr(drawing.CROP_WIDTH)
_LAYOUT_COLUMNS = tl.constexpr(layouts.LAYOUT_COLUMNS)
_GEOMETRY_COLUMNS = tl.constexpr(drawing.GEOMETRY_COLUMNS)
_COLOUR_COLUMNS = tl.constexpr(drawing.COLOUR_COLUMNS)


def views_from_planes(
    planes: Planes,
    first: int,
    size: int,
    colour: Tensor,
    blur_scale: float,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """What ``reference.views_from_planes`` says, for planes on a CUDA device. Waits for nothing."""
    images, count = colour.shape[:2]
    num_views, device = images * count, planes.pixels.device
    tiles = triton.cdiv(size, TILE) ** 2
    out = torch.empty(images, count, 3, size, size, dtype=dtype, device=device)
    sigma = (colour[..., drawing.SIGMA] * blur_scale).flatten()
    blurred = sigma != 0
    places = torch.where(blurred, blurred.cumsum(0) - 1, -1).to(device, torch.int32, non_blocking=True)
    kept = torch.empty(int(blurred.sum()), 3, size, size, dtype=torch.float16, device=device)
    sums = torch.empty(num_views, tiles, dtype=torch.float32, device=device)

    def launch(measure: bool) -> None:
        view_kernel[(num_views * tiles,)](
            planes.pixels, planes.starts, planes.layout, planes.geometry, planes.colour, _orders(device), places,
            mean, std, sums, kept, out, count, planes.geometry.shape[1], first, size,
            MEASURE=measure, CUBIC=planes.cubic, TILES=triton.next_power_of_2(tiles),
            TILE=TILE, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip

    if num_views:
        if (colour[..., drawing.CONTRAST] != 1).any():
            launch(measure=True)
        launch(measure=False)
    if len(kept):
        blur_kernel[(num_views * tiles * 3,)](
            planes.colour, places, mean, std, kept, out, blur_scale, count, planes.geometry.shape[1], first, size,
            TILE=TILE, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return out


@cache
def _orders(device: torch.device) -> Tensor:
    return torch.from_numpy(ORDERS).to(device, torch.int32)


# --- colours: the formulas of colours.py on a tile's red, green and blue ---


@triton.jit
def _clip(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _grey(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _blended(r, g, b, other, factor):
    return _clip(other + factor * (r - other)), _clip(other + factor * (g - other)), _clip(other + factor * (b - other))


@triton.jit
def _fall(k):
    """By how much of the chroma a channel lies below the value, k sextants of hue away."""
    k = tl.where(k >= 6.0, k - 6.0, k)
    return _clip(tl.minimum(k, 4.0 - k))


@triton.jit
def _hue_shifted(r, g, b, shift):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    safe = tl.where(chroma > 0.0, chroma, 1.0)
    hue = tl.where(value == r, (g - b) / safe, tl.where(value == g, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe))
    hue += 6.0 * shift
    hue -= 6.0 * tl.floor(hue * (1 / 6))
    return value - chroma * _fall(hue + 5.0), value - chroma * _fall(hue + 3.0), value - chroma * _fall(hue + 1.0)


@triton.jit
def _normalised(channel, solarise, mean, std, number):
    if solarise != 0.0:
        channel = tl.where(channel < 128 / 255, channel, 1.0 - channel)
    return (channel - tl.load(mean + number)) / tl.load(std + number)


@triton.jit
def _store(out, place, r, g, b, inside, size):
    """``place``: of the pixels in the first of three (size, size) channels."""
    tl.store(out + place, r, inside)
    tl.store(out + size * size + place, g, inside)
    tl.store(out + 2 * size * size + place, b, inside)


# --- the kernels: a program makes one tile of one view, or of one of its channels ---


@triton.jit
def _tile(number, size, TILE: tl.constexpr):
    """Of the tile ``number`` of all views: its view, how many tiles a view has, and its first row and column."""
    across = tl.cdiv(size, TILE)
    tiles = across * across
    tile = number % tiles
    return number // tiles, tiles, tile // across * TILE, tile % across * TILE


@triton.jit
def view_kernel(
    planes,  # (bytes,) uint8
    starts,  # (B + 1,) int64
    layout,  # (B, 6) int32
    geometry,  # (B, all_views, 5) int32
    colour,  # (B, all_views, 8) float32
    orders,  # (24, 4) int32: which part of the jitter comes first, second ...
    places,  # (B * count,) int32: row of ``kept`` of a view to be blurred, else -1
    mean,  # (3,) float32
    std,  # (3,) float32
    sums,  # (B * count, tiles) float32: of the grey value, just before contrast
    kept,  # (views to be blurred, 3, size, size) float16
    out,  # (B, count, 3, size, size)
    count,
    all_views,
    first_view,
    size,
    MEASURE: tl.constexpr,  # whether this is the pass that fills ``sums``
    CUBIC: tl.constexpr,  # which filter
    TILES: tl.constexpr,  # a power of two
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    view, tiles, top, left = _tile(program, size, TILE)
    image = view // count
    row = image * all_views + first_view + view % count
    colour += row * _COLOUR_COLUMNS
    contrast = tl.load(colour + _CONTRAST)
    if MEASURE and contrast == 1.0:
        return

    # ==== crop, resize and flip ====
    y, x = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    inside = (y < size)[:, None] & (x < size)[None, :]
    bottom, right = tl.minimum(top + TILE, size) - 1, tl.minimum(left + TILE, size) - 1
    source_y, source_x = tl.minimum(y, bottom), tl.minimum(x, right)
    first_x, last_x = left, right
    geometry += row * _GEOMETRY_COLUMNS
    if tl.load(geometry + _FLIP) == 1:
        source_x, first_x, last_x = size - 1 - source_x, size - 1 - right, size - 1 - left

    layout += image * _LAYOUT_COLUMNS
    height, width = tl.load(layout + _HEIGHT), tl.load(layout + _WIDTH)
    factor_y, factor_x = tl.load(layout + _FACTOR_Y), tl.load(layout + _FACTOR_X)
    scale = tl.load(layout + _SCALE)
    box_top, box_left = tl.load(geometry + _TOP) / scale, tl.load(geometry + _LEFT) / scale
    box_height = tl.load(geometry + _CROP_HEIGHT) / scale
    box_width = tl.load(geometry + _CROP_WIDTH) / scale
    chroma_height, chroma_width = height // factor_y, width // factor_x

    luma = planes + tl.load(starts + image)
    crop_box: tl.constexpr = cubic_box if CUBIC else box
    weights: tl.constexpr = cubic if CUBIC else triangle
    rows = crop_box(box_top, box_height, height, 1, source_y, top, bottom, size)
    columns = crop_box(box_left, box_width, width, 1, source_x, first_x, last_x, size)
    r = filtered(luma, width, source_y, source_x, rows, columns, weights, ROWS, COLUMNS)
    chroma = luma + height * width
    rows = crop_box(box_top, box_height, chroma_height, factor_y, source_y, top, bottom, size)
    columns = crop_box(box_left, box_width, chroma_width, factor_x, source_x, first_x, last_x, size)
    g = filtered(chroma, chroma_width, source_y, source_x, rows, columns, weights, ROWS, COLUMNS)
    chroma += chroma_height * chroma_width
    b = filtered(chroma, chroma_width, source_y, source_x, rows, columns, weights, ROWS, COLUMNS)

    if tl.load(layout + _KIND) == _YCC:  # JFIF's full range
        luma_, blue, red = r, g - 128.0, b - 128.0
        r = luma_ + 1.402 * red
        g = luma_ - 0.344136 * blue - 0.714136 * red
        b = luma_ + 1.772 * blue
    r, g, b = _clip(r * (1 / 255)), _clip(g * (1 / 255)), _clip(b * (1 / 255))

    # ==== colours ====
    orders += tl.load(colour + _ORDER).to(tl.int32) * 4
    for position in range(4):
        part = tl.load(orders + position)
        factor = tl.load(colour + part)
        if part == _HUE:
            if factor != 0.0:
                r, g, b = _hue_shifted(r, g, b, factor)
        elif factor != 1.0:
            if part == _BRIGHTNESS:
                r, g, b = _clip(r * factor), _clip(g * factor), _clip(b * factor)
            elif part == _SATURATION:
                r, g, b = _blended(r, g, b, _grey(r, g, b), factor)
            elif MEASURE:
                tl.store(sums + program, tl.sum(tl.where(inside, _grey(r, g, b), 0.0)))
            else:
                each = tl.arange(0, TILES)
                total = tl.sum(tl.load(sums + view * tiles + each, each < tiles, 0.0))
                r, g, b = _blended(r, g, b, total / (size * size), factor)

    # ==== what is left, or is left to the blur ====
    if not MEASURE:
        if tl.load(colour + _GREY) != 0.0:
            grey = _grey(r, g, b)
            r, g, b = grey, grey, grey
        pixel = y[:, None] * size + x[None, :]
        place = tl.load(places + view)
        if place >= 0:
            _store(kept + place.to(tl.int64) * 3 * size * size, pixel, r, g, b, inside, size)
        else:
            solarise = tl.load(colour + _SOLARISE)
            r, g = _normalised(r, solarise, mean, std, 0), _normalised(g, solarise, mean, std, 1)
            b = _normalised(b, solarise, mean, std, 2)
            _store(out + view.to(tl.int64) * 3 * size * size, pixel, r, g, b, inside, size)


@triton.jit
def blur_kernel(
    colour,  # as for view_kernel, all of them
    places,
    mean,
    std,
    kept,
    out,
    blur_scale,
    count,
    all_views,
    first_view,
    size,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Blur, solarise and normalise the views that ``view_kernel`` kept."""
    view, _, top, left = _tile(tl.program_id(0) // 3, size, TILE)
    place = tl.load(places + view)
    if place < 0:
        return
    colour += (view // count * all_views + first_view + view % count) * _COLOUR_COLUMNS
    sigma = tl.load(colour + _SIGMA) * blur_scale
    radius = tl.minimum(tl.ceil(3.0 * sigma).to(tl.int32), size - 1)
    y, x = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    inside = (y < size)[:, None] & (x < size)[None, :]
    bottom, right = tl.minimum(top + TILE, size) - 1, tl.minimum(left + TILE, size) - 1
    source_y, source_x = tl.minimum(y, bottom), tl.minimum(x, right)
    total = 1.0
    for distance in range(1, radius + 1):
        total += 2.0 * bell(distance, 1.0 / sigma, radius)
    totals = total + tl.zeros((TILE,), tl.float32)
    parameters = (1.0 / sigma, radius, size)
    rows = (tl.maximum(top - radius, 0), tl.minimum(bottom + radius + 1, size), totals, parameters)
    columns = (tl.maximum(left - radius, 0), tl.minimum(right + radius + 1, size), totals, parameters)
    channel = tl.program_id(0) % 3
    kept += (place.to(tl.int64) * 3 + channel) * size * size
    values = filtered(kept, size, source_y, source_x, rows, columns, gaussian, ROWS, COLUMNS)
    values = _normalised(values, tl.load(colour + _SOLARISE), mean, std, channel)
    out += (view.to(tl.int64) * 3 + channel) * size * size
    tl.store(out + y[:, None] * size + x[None, :], values, inside)
