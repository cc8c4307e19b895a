"""Planes to views on a CPU, compiled: crop, antialiased resize, flip and conversion to RGB.

The filters are Pillow's antialiased ones: bilinear, a triangle as wide as the downscale, and bicubic (a = -1/2), twice as
wide. They are applied separably, first down the columns, then along the rows of 16 x 16 transposed tiles, so that both
passes add neighbouring bytes under one weight. Weights have eight fractional bits, so that a sum fits sixteen; the cubic's,
some of which are negative, have seven, and its sums are kept within a byte as Pillow keeps them. The rounding of weights is
carried from tap to tap and they add to exactly one.

The innermost operations are written as LLVM vectors, which become AVX-512, AVX2, SSE or NEON as the machine has
them: left to the compiler the same loops were ten times slower.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from .drawing import CROP_HEIGHT, CROP_WIDTH, FLIP, LEFT, TOP
from .planes import FACTOR_X, FACTOR_Y, HEIGHT, KIND, SCALE, SLACK, WIDTH, YCC

intrinsic: Any = numba_intrinsic  # untyped: called with one argument less than it is written with

LANES = 32
"""Sums that one vector operation makes: a 512-bit register of sixteen bits each, or two of 256."""
TILE = 16
"""Side of the byte tiles that are transposed in registers."""
LIFT = 64
"""Levels by which the cubic's sums are lifted, so that they are positive."""
assert SLACK >= LANES and LANES % TILE == 0

_BYTE, _HALF, _WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)


def _vector_at(context, builder, array_type, array, index, lanes):
    """A pointer to ``lanes`` neighbouring bytes of a numba array of bytes."""
    data = context.make_array(array_type)(context, builder, array).data
    return cgutils.pointer_add(builder, data, index, ir.VectorType(_BYTE, lanes).as_pointer())


def _add_weighted(context, builder, signature, arguments, start: int):
    """The LANES sums start + sum_t weights[weights_at + t] * samples[at + t * stride + i], sixteen bits that wrap around.

    arguments: those of ``_weighted_sum``.
    """
    samples, at, stride, weights, weights_at, taps, _, _ = arguments
    sums, first = ir.VectorType(_HALF, LANES), ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
    undefined = ir.Constant(sums, ir.Undefined)
    weight_array = context.make_array(signature.args[3])(context, builder, weights)
    weight_bytes = ir.Constant(at.type, 2)
    total = cgutils.alloca_once_value(builder, ir.Constant(sums, [start] * LANES))  # lives in a register
    with cgutils.for_range(builder, taps) as tap:
        index = builder.add(at, builder.mul(tap.index, stride))
        pixels = builder.load(_vector_at(context, builder, signature.args[0], samples, index, LANES), align=1)
        offset = builder.mul(builder.add(weights_at, tap.index), weight_bytes)
        weight = builder.load(cgutils.pointer_add(builder, weight_array.data, offset, _HALF.as_pointer()))
        weight = builder.insert_element(undefined, weight, ir.Constant(_WORD, 0))
        product = builder.mul(builder.zext(pixels, sums), builder.shuffle_vector(weight, undefined, first))
        builder.store(builder.add(builder.load(total), product), total)
    return builder.load(total)


def _store_bytes(context, builder, signature, arguments, values):
    out, out_at = arguments[6:]
    values = builder.trunc(values, ir.VectorType(_BYTE, LANES))
    builder.store(values, _vector_at(context, builder, signature.args[6], out, out_at, LANES), align=1)
    return context.get_dummy_value()


@intrinsic
def _weighted_sum(_, samples, at, stride, weights, weights_at, taps, out, out_at):
    """out[out_at + i] = (128 + sum_t weights[weights_at + t] * samples[at + t * stride + i]) >> 8 for i < LANES.

    samples, out: uint8 arrays; weights: a uint16 array; the rest intp.
    """
    signature = types.void(samples, types.intp, types.intp, weights, types.intp, types.intp, out, types.intp)

    def generate(context, builder, signature, arguments):
        total = _add_weighted(context, builder, signature, arguments, 128)
        rounded = builder.lshr(total, ir.Constant(total.type, [8] * LANES))
        return _store_bytes(context, builder, signature, arguments, rounded)

    return signature, generate


@intrinsic
def _weighted_sum_cubic(_, samples, at, stride, weights, weights_at, taps, out, out_at):
    """As ``_weighted_sum`` with weights of seven fractional bits, which may be negative (two's complement): what is below 0 or
    above 255 becomes these.
    """
    signature = types.void(samples, types.intp, types.intp, weights, types.intp, types.intp, out, types.intp)

    def generate(context, builder, signature, arguments):
        # Lifted so far that no sum of a byte's overshoot, at most a fifth of it on either side, leaves sixteen bits.
        total = _add_weighted(context, builder, signature, arguments, 64 + (LIFT << 7))
        low, high = (ir.Constant(total.type, [LIFT + level] * LANES) for level in (0, 255))
        rounded = builder.lshr(total, ir.Constant(total.type, [7] * LANES))
        rounded = builder.select(builder.icmp_unsigned("<", rounded, low), low, rounded)
        rounded = builder.select(builder.icmp_unsigned(">", rounded, high), high, rounded)
        return _store_bytes(context, builder, signature, arguments, builder.sub(rounded, low))

    return signature, generate


@intrinsic
def _transpose_tile(_, source, at, stride, out, out_at, out_stride):
    """out[out_at + j * out_stride + i] = source[at + i * stride + j] for i, j < TILE, of uint8 arrays."""
    signature = types.void(source, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        source, at, stride, out, out_at, out_stride = arguments

        def row(array_type, array, at, stride, r):
            index = builder.add(at, builder.mul(ir.Constant(at.type, r), stride))
            return _vector_at(context, builder, array_type, array, index, TILE)

        rows = [builder.load(row(signature.args[0], source, at, stride, r), align=1) for r in range(TILE)]
        half, mask = TILE // 2, ir.VectorType(_WORD, TILE)
        low = ir.Constant(mask, [lane for i in range(half) for lane in (i, TILE + i)])
        high = ir.Constant(mask, [lane for i in range(half, TILE) for lane in (i, TILE + i)])
        for _ in range(
            TILE.bit_length() - 1
        ):  # perfect shuffles: as many as it takes to bring every row back to its place
            rows = [builder.shuffle_vector(rows[r], rows[r + half], end) for r in range(half) for end in (low, high)]
        for r in range(TILE):
            builder.store(rows[r], row(signature.args[3], out, out_at, out_stride, r), align=1)
        return context.get_dummy_value()

    return signature, generate


@njit(cache=True, nogil=True)
def _cubic(distance):
    """Keys' kernel with a = -1/2, of a distance of at most 2."""
    if distance < 1.0:
        return (1.5 * distance - 2.5) * distance * distance + 1.0
    return ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0


@njit(cache=True, nogil=True)
def _filter(start, length, limit, size, factor, mirrored, cubic):
    """How ``size`` output pixels are made of the input pixels ``start`` .. ``start + length`` (fractions allowed) of
    ``limit``.

    ``factor`` is 1 for a plane at the image's resolution. Subsampled chroma (2, 4) is enlarged first in other decoders,
    by a triangle of one sample: two triangles one behind the other are nearly one, whose width has the sum of their
    squares. Where ``cubic`` enlarges it too, the result is nearly the first triangle's: a cubic leaves a ramp as it is.

    Returns per output pixel its first input pixel and its number of taps (size,) int64, and its weights (size, taps)
    uint16, of sum 256, or 128 of the cubic. No pixel outside the box is read: nothing leaks across the edge of a crop.
    """
    scale = length / size
    support, one = max(scale, 1.0), 256.0
    if factor > 1 and not cubic:
        support = np.sqrt(1.0 + max(scale, 1.0 / factor) ** 2)
    slope = 1.0 / support
    curved = cubic and (factor == 1 or scale > 1.0)
    if curved:
        support *= 2.0
    if cubic:
        one = 128.0
    low, high = int(np.floor(start)), min(limit, int(np.ceil(start + length)))
    first, taps = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, int(2.0 * support) + 2), np.uint16)
    curve = np.empty(weights.shape[1])
    for i in range(size):
        centre = start + (i + 0.5) * scale
        begin = min(max(low, int(np.floor(centre - support + 0.5))), high - 1)
        end = max(min(high, int(np.floor(centre + support + 0.5))), begin + 1)
        total = 0.0
        for t in range(end - begin):
            distance = abs(begin + t + 0.5 - centre) * slope
            curve[t] = _cubic(min(distance, 2.0)) if curved else max(0.0, 1.0 - distance)
            total += curve[t]
        if total == 0.0:  # an edge pixel of which the box has less than half
            curve[0] = total = 1.0
        place = size - 1 - i if mirrored else i
        first[place], taps[place] = begin, end - begin
        unit, carry = one / total, 0.5
        for t in range(end - begin):
            carry += curve[t] * unit
            whole = np.int64(np.floor(carry))
            weights[place, t] = np.uint16(whole & 0xFFFF)
            carry -= whole
    return first, taps, weights


@njit(cache=True, nogil=True)
def _resize(planes, at, stride, rows, columns, cubic, out, out_stride):
    """Apply one filter down and one along the plane whose first byte is ``planes[at]``, both of ``cubic`` weights or neither.

    The result goes to the start of ``out``, a flat uint8 array, with rows of ``out_stride`` bytes: the size rounded up
    to LANES.
    """
    first_y, taps_y, weights_y = rows
    first_x, taps_x, weights_x = columns
    max_taps_y, max_taps_x = weights_y.shape[1], weights_x.shape[1]
    flat_y, flat_x = weights_y.ravel(), weights_x.ravel()
    size = len(first_x)
    left = min(first_x[0], first_x[-1])
    width = max(first_x[0] + taps_x[0], first_x[-1] + taps_x[-1]) - left
    width = (
        (width + LANES - 1) // LANES * LANES
    )  # beyond the crop lie its neighbours or the slack: computed, never used
    lines = np.empty(LANES * width, np.uint8)  # (row, x), squeezed down
    turned = np.empty(width * LANES, np.uint8)  # (x, row)
    squeezed = np.empty(out_stride * LANES, np.uint8)  # (x, row), squeezed along too
    for block in range(0, size, LANES):
        height = min(LANES, size - block)
        for r in range(height):
            y = block + r
            line = at + first_y[y] * stride + left
            for x in range(0, width, LANES):
                if cubic:
                    _weighted_sum_cubic(
                        planes, line + x, stride, flat_y, y * max_taps_y, taps_y[y], lines, r * width + x
                    )
                else:
                    _weighted_sum(planes, line + x, stride, flat_y, y * max_taps_y, taps_y[y], lines, r * width + x)
        for r in range(0, height, TILE):
            for x in range(0, width, TILE):
                _transpose_tile(lines, r * width + x, width, turned, x * LANES + r, LANES)
        for x in range(size):
            line = (first_x[x] - left) * LANES
            if cubic:
                _weighted_sum_cubic(turned, line, LANES, flat_x, x * max_taps_x, taps_x[x], squeezed, x * LANES)
            else:
                _weighted_sum(turned, line, LANES, flat_x, x * max_taps_x, taps_x[x], squeezed, x * LANES)
        for r in range(0, height, TILE):
            for x in range(0, size, TILE):
                _transpose_tile(squeezed, x * LANES + r, LANES, out, (block + r) * out_stride + x, out_stride)


@njit(cache=True, nogil=True)
def _to_rgb(luma, blue, red, out):
    """JFIF's full-range YCbCr planes to ``out`` (3, S, S), in 14-bit fixed point; rows of the planes may be longer than
    S."""
    size = out.shape[1]
    for row in range(size):
        y_, cb_, cr_ = luma[row], blue[row], red[row]
        r_, g_, b_ = out[0, row], out[1, row], out[2, row]
        for i in range(size):
            y = np.int32(y_[i]) << np.int32(14)
            cb, cr = np.int32(cb_[i]) - np.int32(128), np.int32(cr_[i]) - np.int32(128)
            r = (y + np.int32(22970) * cr + np.int32(8192)) >> np.int32(14)
            g = (y - np.int32(5638) * cb - np.int32(11700) * cr + np.int32(8192)) >> np.int32(14)
            b = (y + np.int32(29032) * cb + np.int32(8192)) >> np.int32(14)
            r_[i] = np.uint8(min(max(r, np.int32(0)), np.int32(255)))
            g_[i] = np.uint8(min(max(g, np.int32(0)), np.int32(255)))
            b_[i] = np.uint8(min(max(b, np.int32(0)), np.int32(255)))


@njit(cache=True, nogil=True)
def resize_views(planes, plane_starts, layout, geometry, sizes, view_starts, first_image, cubic, out):
    """Every view of n decoded images.

    planes: (bytes,) uint8, plane_starts: (n + 1,) and layout: (n, 6) int32, of ``decode_planes``. geometry: (n, V, 5)
    int32, of ViewParameters. sizes: (V,) sides of the views in pixels. cubic: which filter. The view v of the image i is written
    to the flat uint8 array ``out`` as (3, size, size) RGB, from ``view_starts[v, 0] + (first_image + i) * view_starts[v, 1]`` on.
    """
    longest = (sizes.max() + LANES - 1) // LANES * LANES
    scratch = np.empty(3 * longest * longest, np.uint8)
    for i in range(len(layout)):
        scale, height, width = layout[i, SCALE], layout[i, HEIGHT], layout[i, WIDTH]
        factor_y, factor_x = layout[i, FACTOR_Y], layout[i, FACTOR_X]
        chroma_height, chroma_width = height // factor_y, width // factor_x
        for v in range(len(sizes)):
            size = sizes[v]
            view = geometry[i, v]
            top, left, flip = view[TOP] / scale, view[LEFT] / scale, view[FLIP] == 1
            box_height, box_width = view[CROP_HEIGHT] / scale, view[CROP_WIDTH] / scale
            rows = _filter(top, box_height, height, size, 1, False, cubic)
            columns = _filter(left, box_width, width, size, 1, flip, cubic)
            stride = (size + LANES - 1) // LANES * LANES
            resized = scratch[: 3 * stride * stride].reshape(3, stride, stride)
            for plane in range(3):
                if plane == 1 and factor_y > 1:
                    rows = _filter(top / factor_y, box_height / factor_y, chroma_height, size, factor_y, False, cubic)
                if plane == 1 and factor_x > 1:
                    columns = _filter(left / factor_x, box_width / factor_x, chroma_width, size, factor_x, flip, cubic)
                at = plane_starts[i]
                if plane > 0:
                    at += height * width + (plane - 1) * chroma_height * chroma_width
                plane_width = width if plane == 0 else chroma_width
                _resize(planes, at, plane_width, rows, columns, cubic, resized[plane].ravel(), stride)
            begin = view_starts[v, 0] + (first_image + i) * view_starts[v, 1]
            pixels = out[begin : begin + 3 * size * size].reshape(3, size, size)
            if layout[i, KIND] == YCC:
                _to_rgb(resized[0], resized[1], resized[2], pixels)
            else:
                pixels[:] = resized[:, :size, :size]
