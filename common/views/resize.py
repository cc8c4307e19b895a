"""Planes to views on a CPU, compiled: crop, antialiased resize, flip and conversion to RGB.

The filter is Pillow's antialiased bilinear: a triangle as wide as the downscale. It is applied separably, first down
the columns, then along the rows of 16 x 16 transposed tiles, so that both passes add neighbouring bytes under one
weight. Weights have eight fractional bits, so that a sum fits sixteen; their rounding is carried from tap to tap and
they add to exactly one.

The two innermost operations are written as LLVM vectors, which become AVX-512, AVX2, SSE or NEON as the machine has
them: left to the compiler the same loops were ten times slower.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from .decode import FACTOR_X, FACTOR_Y, HEIGHT, KIND, SCALE, SLACK, WIDTH, YCC
from .drawing import CROP_HEIGHT, CROP_WIDTH, FLIP, LEFT, TOP

intrinsic: Any = numba_intrinsic  # untyped: called with one argument less than it is written with

LANES = 32
"""Sums that one vector operation makes: a 512-bit register of sixteen bits each, or two of 256."""
TILE = 16
"""Side of the byte tiles that are transposed in registers."""
assert SLACK >= LANES and LANES % TILE == 0

_BYTE, _HALF, _WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)


def _vector_at(context, builder, array_type, array, index, lanes):
    """A pointer to ``lanes`` neighbouring bytes of a numba array of bytes."""
    data = context.make_array(array_type)(context, builder, array).data
    return cgutils.pointer_add(builder, data, index, ir.VectorType(_BYTE, lanes).as_pointer())


@intrinsic
def _weighted_sum(_, samples, at, stride, weights, weights_at, taps, out, out_at):
    """out[out_at + i] = (128 + sum_t weights[weights_at + t] * samples[at + t * stride + i]) >> 8 for i < LANES.

    samples, out: uint8 arrays; weights: a uint16 array; the rest intp.
    """
    signature = types.void(samples, types.intp, types.intp, weights, types.intp, types.intp, out, types.intp)

    def generate(context, builder, signature, arguments):
        samples, at, stride, weights, weights_at, taps, out, out_at = arguments
        bytes_, sums = ir.VectorType(_BYTE, LANES), ir.VectorType(_HALF, LANES)
        undefined, first = ir.Constant(sums, ir.Undefined), ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
        weight_array = context.make_array(signature.args[3])(context, builder, weights)
        weight_bytes = ir.Constant(at.type, 2)
        total = cgutils.alloca_once_value(builder, ir.Constant(sums, [128] * LANES))  # lives in a register
        with cgutils.for_range(builder, taps) as tap:
            index = builder.add(at, builder.mul(tap.index, stride))
            pixels = builder.load(_vector_at(context, builder, signature.args[0], samples, index, LANES), align=1)
            offset = builder.mul(builder.add(weights_at, tap.index), weight_bytes)
            weight = builder.load(cgutils.pointer_add(builder, weight_array.data, offset, _HALF.as_pointer()))
            weight = builder.insert_element(undefined, weight, ir.Constant(_WORD, 0))
            product = builder.mul(builder.zext(pixels, sums), builder.shuffle_vector(weight, undefined, first))
            builder.store(builder.add(builder.load(total), product), total)
        rounded = builder.trunc(builder.lshr(builder.load(total), ir.Constant(sums, [8] * LANES)), bytes_)
        builder.store(rounded, _vector_at(context, builder, signature.args[6], out, out_at, LANES), align=1)
        return context.get_dummy_value()

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
def _filter(start, length, limit, size, factor, mirrored):
    """How ``size`` output pixels are made of the input pixels ``start`` .. ``start + length`` (fractions allowed) of
    ``limit``.

    ``factor`` is 1 for a plane at the image's resolution. Subsampled chroma (2, 4) is enlarged first in other decoders,
    by a triangle of one sample: two triangles one behind the other are nearly one, whose width has the sum of their
    squares.

    Returns per output pixel its first input pixel and its number of taps (size,) int64, and its weights (size, taps)
    uint16, of sum 256. No pixel outside the box is read: nothing leaks across the edge of a crop.
    """
    scale = length / size
    support = max(scale, 1.0)
    if factor > 1:
        support = np.sqrt(1.0 + max(scale, 1.0 / factor) ** 2)
    slope = 1.0 / support
    low, high = int(np.floor(start)), min(limit, int(np.ceil(start + length)))
    first, taps = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, int(2.0 * support) + 2), np.uint16)
    triangle = np.empty(weights.shape[1])
    for i in range(size):
        centre = start + (i + 0.5) * scale
        begin = min(max(low, int(np.floor(centre - support + 0.5))), high - 1)
        end = max(min(high, int(np.floor(centre + support + 0.5))), begin + 1)
        total = 0.0
        for t in range(end - begin):
            triangle[t] = max(0.0, 1.0 - abs(begin + t + 0.5 - centre) * slope)
            total += triangle[t]
        if total == 0.0:  # an edge pixel of which the box has less than half
            triangle[0] = total = 1.0
        place = size - 1 - i if mirrored else i
        first[place], taps[place] = begin, end - begin
        unit, carry = 256.0 / total, 0.5
        for t in range(end - begin):
            carry += triangle[t] * unit
            weights[place, t] = np.uint16(int(carry))
            carry -= int(carry)
    return first, taps, weights


@njit(cache=True, nogil=True)
def _resize(planes, at, stride, rows, columns, out, out_stride):
    """Apply one filter down and one along the plane whose first byte is ``planes[at]``.

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
                _weighted_sum(planes, line + x, stride, flat_y, y * max_taps_y, taps_y[y], lines, r * width + x)
        for r in range(0, height, TILE):
            for x in range(0, width, TILE):
                _transpose_tile(lines, r * width + x, width, turned, x * LANES + r, LANES)
        for x in range(size):
            line = (first_x[x] - left) * LANES
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
def resize_views(planes, plane_starts, layout, geometry, sizes, view_starts, first_image, out):
    """Every view of n decoded images.

    planes: (bytes,) uint8, plane_starts: (n + 1,) and layout: (n, 6) int32, of ``decode_planes``. geometry: (n, V, 5)
    int32, of ViewParameters. sizes: (V,) sides of the views in pixels. The view v of the image i is written to the flat
    uint8 array ``out`` as (3, size, size) RGB, from ``view_starts[v, 0] + (first_image + i) * view_starts[v, 1]`` on.
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
            rows = _filter(top, box_height, height, size, 1, False)
            columns = _filter(left, box_width, width, size, 1, flip)
            stride = (size + LANES - 1) // LANES * LANES
            resized = scratch[: 3 * stride * stride].reshape(3, stride, stride)
            for plane in range(3):
                if plane == 1 and factor_y > 1:
                    rows = _filter(top / factor_y, box_height / factor_y, chroma_height, size, factor_y, False)
                if plane == 1 and factor_x > 1:
                    columns = _filter(left / factor_x, box_width / factor_x, chroma_width, size, factor_x, flip)
                at = plane_starts[i]
                if plane > 0:
                    at += height * width + (plane - 1) * chroma_height * chroma_width
                plane_width = width if plane == 0 else chroma_width
                _resize(planes, at, plane_width, rows, columns, resized[plane].ravel(), stride)
            begin = view_starts[v, 0] + (first_image + i) * view_starts[v, 1]
            pixels = out[begin : begin + 3 * size * size].reshape(3, size, size)
            if layout[i, KIND] == YCC:
                _to_rgb(resized[0], resized[1], resized[2], pixels)
            else:
                pixels[:] = resized[:, :size, :size]
