"""Crop and antialiased resize of 8-bit planes, compiled: the part of a view that costs the time on a CPU.

The filter is Pillow's antialiased bilinear (a triangle as wide as the downscale), applied separably: first down the columns, where
neighbouring bytes share a weight and vectorise, then, on blocks transposed to lie in cache, along the rows in the same way. Weights
have eight fractional bits, so that a sum fits sixteen; their rounding is carried from tap to tap and adds to exactly one.

Planes come out transposed (column-major), because the second pass leaves them so; the conversion to floats transposes for free.
"""

import numpy as np
from numba import njit

BLOCK = 32
"""Output rows handled together in the second pass: two AVX2 registers of sixteen-bit sums."""


@njit(cache=True, nogil=True)
def _weights(start, length, low, high, size, first, taps, weights):
    """Per output pixel the first input pixel, the number of taps and the weights (sum 256), for inputs ``start`` .. ``start+length``.

    ``low`` and ``high`` bound the input pixels that may be read (the crop's own: no leaking across its edge).
    """
    scale = length / size
    support = max(scale, 1.0)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        begin = max(low, int(np.floor(centre - support + 0.5)))
        end = min(high, int(np.floor(centre + support + 0.5)))
        if end <= begin:
            begin = min(max(low, int(np.floor(centre))), high - 1)
            end = begin + 1
        total = 0.0
        for x in range(begin, end):
            total += max(0.0, 1.0 - abs(x + 0.5 - centre) / support)
        if total <= 0.0:
            total = 1.0
            end = begin + 1
        carry = 0.5
        for x in range(begin, end):
            w = max(0.0, 1.0 - abs(x + 0.5 - centre) / support) / total if end > begin + 1 else 1.0
            carry += 256.0 * w
            weights[i, x - begin] = np.uint16(int(carry))
            carry -= int(carry)
        first[i] = begin
        taps[i] = end - begin


@njit(cache=True, nogil=True)
def max_taps(length, size):
    """An upper bound of the taps of one output pixel when ``length`` input pixels become ``size``, rounded up to four."""
    return (2 * int(np.ceil(max(length / size, 1.0))) + 3 + 3) // 4 * 4


@njit(cache=True, nogil=True)
def _blend4(r0, r1, r2, r3, w0, w1, w2, w3, acc, n):
    for x in range(n):
        acc[x] = np.uint16(w0 * r0[x] + w1 * r1[x] + w2 * r2[x] + w3 * r3[x] + np.uint16(128))


@njit(cache=True, nogil=True)
def _blend4_more(r0, r1, r2, r3, w0, w1, w2, w3, acc, n):
    for x in range(n):
        acc[x] = np.uint16(acc[x] + w0 * r0[x] + w1 * r1[x] + w2 * r2[x] + w3 * r3[x])


@njit(cache=True, nogil=True)
def crop_resize(plane, top, left, height, width, size, flip, out):
    """Resize the box of ``plane`` (H, W) uint8 to ``out`` (size, size) uint8, written transposed: ``out[x, y]``.

    The box is in pixels of the plane and may be fractional (a subsampled chroma plane, a scaled decode).
    """
    plane_height, plane_width = plane.shape
    low_y, high_y = int(np.floor(top)), min(plane_height, int(np.ceil(top + height)))
    low_x, high_x = int(np.floor(left)), min(plane_width, int(np.ceil(left + width)))
    n = high_x - low_x
    first_y, taps_y = np.empty(size, np.int64), np.empty(size, np.int64)
    first_x, taps_x = np.empty(size, np.int64), np.empty(size, np.int64)
    weights_y = np.zeros((size, max_taps(height, size)), np.uint16)
    weights_x = np.zeros((size, max_taps(width, size)), np.uint16)
    _weights(top, height, low_y, high_y, size, first_y, taps_y, weights_y)
    _weights(left, width, low_x, high_x, size, first_x, taps_x, weights_x)

    acc = np.empty(n, np.uint16)
    columns = np.empty((n, BLOCK), np.uint8)
    sums = np.empty(BLOCK, np.uint16)
    for block in range(0, size, BLOCK):
        rows = min(BLOCK, size - block)
        for r in range(rows):
            y, w = first_y[block + r], weights_y[block + r]
            last = y + taps_y[block + r] - 1
            for t in range(0, taps_y[block + r], 4):
                r0 = plane[min(y + t, last), low_x:high_x]
                r1 = plane[min(y + t + 1, last), low_x:high_x]
                r2 = plane[min(y + t + 2, last), low_x:high_x]
                r3 = plane[min(y + t + 3, last), low_x:high_x]
                if t == 0:
                    _blend4(r0, r1, r2, r3, w[t], w[t + 1], w[t + 2], w[t + 3], acc, n)
                else:
                    _blend4_more(r0, r1, r2, r3, w[t], w[t + 1], w[t + 2], w[t + 3], acc, n)
            for x in range(n):
                columns[x, r] = acc[x] >> np.uint16(8)
        for x in range(size):
            begin, w = first_x[x] - low_x, weights_x[x]
            for r in range(BLOCK):
                sums[r] = 128
            for t in range(taps_x[x]):
                column, wt = columns[begin + t], w[t]
                for r in range(BLOCK):
                    sums[r] = np.uint16(sums[r] + wt * column[r])
            target = out[size - 1 - x if flip else x]
            for r in range(rows):
                target[block + r] = sums[r] >> np.uint16(8)
