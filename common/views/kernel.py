"""Planes to views on a GPU, in Triton: crop, antialiased resize, flip, colours and normalisation, each pixel written once.

A resize is two matrix products, ``down @ plane @ along.T``. The matrices hold the weights of the filters of ``resize.py``
(``triangle``, ``cubic``); they are banded, so a tile of a view needs only the part of the plane under it, and each weight
is made in registers where it is used. Bytes and weights fit float16, sums are float32. A blur has the same form, with
Gaussian weights that fold the reflected border back in.

Contrast needs the mean of the whole view in the middle of the colours. A view is many programs, so ``view_kernel`` runs
twice: first to leave each tile's grey sum, then to write. Reading the planes again, most of them still in the second-level
cache, costs at most 1.5 bytes times the square of the downscale a pixel; a view kept in between would cost 6 to 9.
What follows a blur waits for ``blur_kernel``: of those views only, the first kernel's result is kept, in float16.

Both chroma planes are made in one loop: their pixels are under way while the weights, which they share, are made.

Under Triton's interpreter, and compiled ahead of time for sm_80 and sm_90. An earlier form, planes one by one and out in rows of
a channel, was checked on an H200 (2026-11-26), where no time was taken.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import drawing
from . import planes as layouts
from .kernel_blur import COLUMNS, ROWS, TILE, WARPS, WIDE, blur, tile
from .kernel_filters import box, cubic, cubic_box, filtered, filtered_pair, triangle
from .kernel_formulas import channels_last, clip, coloured, finish, orders_on, places_of
from .planes import Planes

_YCC = tl.constexpr(layouts.YCC)
_KIND, _SCALE, _HEIGHT = tl.constexpr(layouts.KIND), tl.constexpr(layouts.SCALE), tl.constexpr(layouts.HEIGHT)
_WIDTH, _FACTOR_Y, _FACTOR_X = (
    tl.constexpr(layouts.WIDTH),
    tl.constexpr(layouts.FACTOR_Y),
    tl.constexpr(layouts.FACTOR_X),
)
_CONTRAST = tl.constexpr(drawing.CONTRAST)
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
    """What ``reference.views_from_planes`` says, for planes on a CUDA device, channels last. Waits for nothing."""
    images, count = colour.shape[:2]
    num_views, device = images * count, planes.pixels.device
    tiles = triton.cdiv(size, TILE) ** 2
    out = channels_last(num_views, size, dtype, device).unflatten(0, (images, count))
    places, blurred = places_of(colour[..., drawing.SIGMA].flatten(), device)
    kept = torch.empty(blurred, 3, size, size, dtype=torch.float16, device=device)
    sums = torch.empty(num_views, tiles, dtype=torch.float32, device=device)

    def launch(measure: bool) -> None:
        view_kernel[(num_views * tiles,)](
            planes.pixels, planes.starts, planes.layout, planes.geometry, planes.colour, orders_on(device), places,
            mean, std, sums, kept, out, count, planes.geometry.shape[1], first, size,
            MEASURE=measure, CUBIC=planes.cubic, TILES=triton.next_power_of_2(tiles),
            TILE=TILE, ROWS=ROWS, COLUMNS=COLUMNS, WIDE=wide_columns(device), num_warps=WARPS,
        )  # fmt: skip

    if num_views:
        if (colour[..., drawing.CONTRAST] != 1).any():
            launch(measure=True)
        launch(measure=False)
    if blurred:
        blur(planes.colour, places, mean, std, kept, out, blur_scale, planes.geometry.shape[1], first)
    return out


def wide_columns(device: torch.device) -> int:
    return WIDE if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else COLUMNS


# --- the kernel: a program makes one tile of one view ---


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
    out,  # (B, count, size, size, 3)
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
    WIDE: tl.constexpr,  # of the first plane
):
    program = tl.program_id(0)
    view, tiles, top, left = tile(program, size, TILE)
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
    r = filtered(luma, width, source_y, source_x, rows, columns, weights, ROWS, WIDE)
    chroma = luma + height * width
    rows = crop_box(box_top, box_height, chroma_height, factor_y, source_y, top, bottom, size)
    columns = crop_box(box_left, box_width, chroma_width, factor_x, source_x, first_x, last_x, size)
    apart = chroma_height * chroma_width
    g, b = filtered_pair(chroma, apart, chroma_width, source_y, source_x, rows, columns, weights, ROWS, COLUMNS)

    if tl.load(layout + _KIND) == _YCC:  # JFIF's full range
        luma_, blue, red = r, g - 128.0, b - 128.0
        r = luma_ + 1.402 * red
        g = luma_ - 0.344136 * blue - 0.714136 * red
        b = luma_ + 1.772 * blue
    r, g, b = clip(r * (1 / 255)), clip(g * (1 / 255)), clip(b * (1 / 255))

    # ==== colours ====
    r, g, b = coloured(r, g, b, colour, orders, sums, program, view, tiles, inside, size * size, MEASURE, TILES)

    # ==== what is left, or is left to the blur ====
    if not MEASURE:
        pixel = y[:, None] * size + x[None, :]
        finish(r, g, b, colour, places, mean, std, kept, out, view, pixel, inside, size * size)
