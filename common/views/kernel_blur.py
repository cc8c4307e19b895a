"""The blur of views on a GPU, in Triton, with what follows it; and the tiles that views are made in."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from . import drawing
from .kernel_filters import bell, filtered, gaussian
from .kernel_formulas import normalised

TILE = 32
"""Side in pixels of the part of a view that one program makes: 224 and 96 are whole multiples."""
ROWS, COLUMNS = 32, 32
"""The part of a plane that is read at once."""
WIDE = 64
"""Columns of the first plane that are read at once from compute capability 9 on: there are twice as many as of the others, and
a tile of a view is 34 and more of them wide. Before, so many do not fit the registers."""
WARPS = 8
"""Of a program. With four, fewer fit a multiprocessor: twice the pixels a thread, and more registers than that costs."""

_SIGMA, _SOLARISE = tl.constexpr(drawing.SIGMA), tl.constexpr(drawing.SOLARISE)
_COLOUR_COLUMNS = tl.constexpr(drawing.COLOUR_COLUMNS)


def blur(
    colour: Tensor,  # (B, all views, 8), on the device
    places: Tensor,
    mean: Tensor,
    std: Tensor,
    kept: Tensor,
    out: Tensor,  # (B, count, 3, size, size), a pixel's channels side by side
    blur_scale: float,
    all_views: int,
    first: int,
) -> None:
    """Blur, solarise and normalise into ``out`` the views that were kept for it."""
    images, count, _, size, _ = out.shape
    blur_kernel[(images * count * triton.cdiv(size, TILE) ** 2 * 3,)](
        colour, places, mean, std, kept, out, blur_scale, count, all_views, first, size,
        TILE=TILE, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def tile(number, size, TILE: tl.constexpr):
    """Of the tile ``number`` of all views: its view, how many tiles a view has, and its first row and column."""
    across = tl.cdiv(size, TILE)
    tiles = across * across
    tile = number % tiles
    return number // tiles, tiles, tile // across * TILE, tile % across * TILE


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
    view, _, top, left = tile(tl.program_id(0) // 3, size, TILE)
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
    ones = tl.full((TILE,), 1.0, tl.float32)  # every pixel has the same sum, which is divided by at the end
    parameters = (1.0 / sigma, radius, size)
    rows = (tl.maximum(top - radius, 0), tl.minimum(bottom + radius + 1, size), ones, parameters)
    columns = (tl.maximum(left - radius, 0), tl.minimum(right + radius + 1, size), ones, parameters)
    channel = tl.program_id(0) % 3
    kept += (place.to(tl.int64) * 3 + channel) * size * size
    values = filtered(kept, size, source_y, source_x, rows, columns, gaussian, ROWS, COLUMNS)
    values *= (1.0 / total) * (1.0 / total)
    values = normalised(values, tl.load(colour + _SOLARISE), mean, std, channel)
    out += view.to(tl.int64) * 3 * size * size + channel
    tl.store(out + (y * (3 * size))[:, None] + (x * 3)[None, :], values, inside)
