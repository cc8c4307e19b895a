"""The filters of ``kernel.py``: two matrix products a tile, whose weights are made in registers."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def filtered(source, stride, y, x, rows, columns, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The pixels (y, x) of a filtered plane: (TILE, TILE) float32.

    rows, columns: the source's that these pixels are made of (begin, end), the sums of their weights (TILE,), and what else
    WEIGHTS asks for.
    """
    top, bottom, down_sum, down_parameters = rows
    left, right, along_sum, along_parameters = columns
    total = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
    for column in range(left, right, COLUMNS):
        source_x = column + tl.arange(0, COLUMNS)
        pointers = source + tl.minimum(source_x, right - 1)[None, :]
        strip = tl.zeros((y.shape[0], COLUMNS), tl.float32)
        for row in range(top, bottom, ROWS):
            source_y = row + tl.arange(0, ROWS)
            pixels = tl.load(pointers + tl.minimum(source_y, bottom - 1)[:, None] * stride)
            down = WEIGHTS(y[:, None], source_y[None, :], bottom, down_parameters)
            strip = tl.dot(down.to(tl.float16), pixels.to(tl.float16), strip)
        along = WEIGHTS(x[None, :], source_x[:, None], right, along_parameters)
        total = tl.dot(strip.to(tl.float16), along.to(tl.float16), total)
    return total * ((1.0 / down_sum)[:, None] * (1.0 / along_sum)[None, :])


@triton.jit
def filtered_pair(
    source, apart, stride, y, x, rows, columns, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``filtered`` of two planes alike, the second ``apart`` from the first: read together, side by side, by the same weights."""
    top, bottom, down_sum, down_parameters = rows
    left, right, along_sum, along_parameters = columns
    TILE: tl.constexpr = y.shape[0]
    both = tl.arange(0, 2 * COLUMNS)
    pair = tl.zeros((2 * TILE, TILE), tl.float32)  # one above the other
    for column in range(left, right, COLUMNS):
        source_x = tl.minimum(column + both % COLUMNS, right - 1) + both // COLUMNS * apart
        strip = tl.zeros((TILE, 2 * COLUMNS), tl.float32)
        for row in range(top, bottom, ROWS):
            source_y = row + tl.arange(0, ROWS)
            pixels = tl.load(source + source_x[None, :] + tl.minimum(source_y, bottom - 1)[:, None] * stride)
            down = WEIGHTS(y[:, None], source_y[None, :], bottom, down_parameters)
            strip = tl.dot(down.to(tl.float16), pixels.to(tl.float16), strip)
        stacked = tl.reshape(
            tl.permute(tl.reshape(strip.to(tl.float16), (TILE, 2, COLUMNS)), (1, 0, 2)), (2 * TILE, COLUMNS)
        )
        tap = column + tl.arange(0, COLUMNS)
        along = WEIGHTS(x[None, :], tap[:, None], right, along_parameters)
        pair = tl.dot(stacked, along.to(tl.float16), pair)
    first, second = tl.split(tl.permute(tl.reshape(pair, (2, TILE, TILE)), (1, 2, 0)))
    norm = (1.0 / down_sum)[:, None] * (1.0 / along_sum)[None, :]
    return first * norm, second * norm


@triton.jit
def triangle(place, tap, end, parameters):
    """The weight of the source's pixel ``tap`` in the view's pixel ``place``, before they are made to add to one."""
    start, scale, slope = parameters
    distance = tl.abs(tap + 0.5 - (start + (place + 0.5) * scale))
    return tl.where(tap < end, tl.maximum(1.0 - distance * slope, 0.0), 0.0)


@triton.jit
def cubic(place, tap, end, parameters):
    """As ``triangle``: Keys' kernel with a = -1/2, or the triangle where it is not ``curved``."""
    start, scale, slope, curved = parameters
    distance = tl.abs(tap + 0.5 - (start + (place + 0.5) * scale)) * slope
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    weight = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    weight = tl.where(curved, weight, tl.maximum(1.0 - distance, 0.0))
    return tl.where(tap < end, weight, 0.0)


@triton.jit
def cubic_box(start, length, limit, factor, place, first, last, size):
    """``box`` of the cubic, which is twice as wide; its weights are added up one by one."""
    start, length = start / factor, length / factor
    scale = length / size
    slope = 1.0 / tl.maximum(scale, 1.0)
    curved = (factor == 1) | (scale > 1.0)
    support = 2.0 / slope
    low = tl.floor(start)
    high = tl.minimum(limit, tl.ceil(start + length))
    begin = tl.maximum(low, tl.floor(start + (first + 0.5) * scale - support + 0.5))
    end = tl.minimum(high, tl.floor(start + (last + 0.5) * scale + support + 0.5))
    lowest = tl.maximum(low, tl.floor(start + (place + 0.5) * scale - support + 0.5))
    total = tl.zeros_like(lowest)
    for tap in range(0, tl.ceil(2.0 * support).to(tl.int32) + 1):
        total += cubic(place, lowest + tap, high, (start, scale, slope, curved))
    return begin.to(tl.int32), end.to(tl.int32), total, (start, scale, slope, curved)


@triton.jit
def box(start, length, limit, factor, place, first, last, size):
    """How the view's pixels ``place``, from first to last, are made of ``limit`` pixels: the filter of ``resize._filter``."""
    start, length = start / factor, length / factor
    scale = length / size
    support = tl.maximum(scale, 1.0)
    if factor > 1:
        wider = tl.maximum(scale, 1.0 / factor)
        support = tl.sqrt(1.0 + wider * wider)
    slope = 1.0 / support
    low = tl.floor(start)
    high = tl.minimum(limit, tl.ceil(start + length))
    begin = tl.maximum(low, tl.floor(start + (first + 0.5) * scale - support + 0.5))
    end = tl.minimum(high, tl.floor(start + (last + 0.5) * scale + support + 0.5))
    # The weights rise by equal steps from tap a to tap m, and fall to tap z: two arithmetic series.
    centre = start + (place + 0.5) * scale
    a = tl.maximum(low, tl.floor(centre - support + 0.5))
    z = tl.minimum(high, tl.floor(centre + support + 0.5))
    m = tl.floor(centre + 0.5)
    total = z - a - ((m - a) * (centre - 0.5 * (a + m)) + (z - m) * (0.5 * (m + z) - centre)) * slope
    return begin.to(tl.int32), end.to(tl.int32), total, (start, scale, slope)


@triton.jit
def bell(distance, slope, radius):
    scaled = distance * slope
    return tl.where(distance <= radius, tl.exp(-0.5 * scaled * scaled), 0.0)


@triton.jit
def gaussian(place, tap, end, parameters):
    """As ``triangle``: a Gaussian cut at ``radius``. Beyond its borders the view is its own mirror image."""
    slope, radius, size = parameters
    weight = bell(tl.abs(tap - place), slope, radius)
    weight += tl.where(tap > 0, bell(tap + place, slope, radius), 0.0)
    weight += tl.where(tap < size - 1, bell(2 * (size - 1) - tap - place, slope, radius), 0.0)
    return tl.where(tap < end, weight, 0.0)
