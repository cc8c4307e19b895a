"""``apply_colours`` on a CPU, compiled: the formulas of ``colours.py``, in as few passes over memory as they allow.

The operations on single pixels follow one another on a piece of the image that stays in the cache. Only contrast, which
needs the mean of the whole image first, and blur, which needs neighbours, make further passes.

numba's cache on disk notices changes in a function's own file only. So no compiled function here calls one of another file.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import permutations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .drawing import CONTRAST, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE

PIECE = 1024
"""Pixels that are worked on together: 12 KiB, well inside the first-level cache."""

ORDERS = np.array(list(permutations(range(4))))
"""(24, 4): which of brightness, contrast, saturation, hue comes first, second, third, fourth. They are columns of colour, too."""

# Without these, float literals are 64 bits wide in numba, and so is everything they touch.
ZERO, ONE, TWO, FOUR, SIX = (np.float32(x) for x in (0, 1, 2, 4, 6))
RED, GREEN, BLUE = (np.float32(x) for x in (0.2989, 0.587, 0.114))
HALF = np.float32(128 / 255)
WHITE = np.float32(255)

# Sums may be reordered and products fused; divisions stay exact, and nothing is assumed about the machine.
compiled = njit(cache=True, nogil=True, fastmath={"nnan", "ninf", "nsz", "reassoc", "contract"})


def apply_colours_compiled(images: Tensor, colour: Tensor, blur_scale: float, mean: Tensor, std: Tensor) -> Tensor:
    """What ``apply_colours`` says, for tensors on the CPU, on as many threads as torch uses."""
    pixels, parameters = images.contiguous().numpy(), colour.contiguous().numpy()
    out = np.empty(pixels.shape, np.float32)  # numpy asks for huge pages: page faults cost more than the colours
    shift, scale = mean.to(torch.float32).numpy(), std.to(torch.float32).reciprocal().numpy()
    threads = torch.get_num_threads()
    step = max(1, -(-len(pixels) // (4 * threads)))

    def some(first: int) -> None:
        part = slice(first, first + step)
        _colour_views(pixels[part], parameters[part], np.float32(blur_scale), shift, scale, out[part])

    for _ in _pool(threads).map(some, range(0, len(pixels), step)):
        pass
    return torch.from_numpy(out)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="colour")


@compiled
def _colour_views(images, colour, blur_scale, mean, scale, out):
    size = images.shape[2]
    pixels = size * size
    blurred = np.empty((size, size), np.float32)
    for n in range(len(images)):
        source, x, parameters = images[n].reshape(3, pixels), out[n].reshape(3, pixels), colour[n]
        order = ORDERS[int(parameters[ORDER])]
        sigma = parameters[SIGMA] * blur_scale
        contrast_at = 4
        if parameters[CONTRAST] != ONE:
            for position in range(4):
                if order[position] == CONTRAST:
                    contrast_at = position
        total, middle = 0.0, ZERO
        for stage in range(1 if contrast_at == 4 else 2):  # contrast needs the mean of what the first stage leaves
            for a in range(0, pixels, PIECE):
                z = min(a + PIECE, pixels)
                r, g, b = x[0, a:z], x[1, a:z], x[2, a:z]
                if stage == 0:
                    _load(source[0, a:z], source[1, a:z], source[2, a:z], r, g, b)
                else:
                    _contrast(middle, parameters[CONTRAST], r, g, b)
                for position in range(0 if stage == 0 else contrast_at + 1, contrast_at if stage == 0 else 4):
                    _adjust(order[position], parameters, r, g, b)
                if stage == 0 and contrast_at < 4:
                    total += _grey_sum(r, g, b)
                else:
                    _finish(parameters, sigma == ZERO, mean, scale, r, g, b)
            middle = np.float32(total / pixels)
        if sigma > ZERO:
            weights = _gaussian(sigma, size)
            for channel in range(3):
                _blur_rows(out[n, channel], weights, blurred)
                _blur_columns(blurred, weights, out[n, channel])
            for a in range(0, pixels, PIECE):
                z = min(a + PIECE, pixels)
                _normalise(parameters, mean, scale, x[0, a:z], x[1, a:z], x[2, a:z])


@compiled
def _clip(value):
    return min(max(value, ZERO), ONE)


@compiled
def _grey(r, g, b):
    return RED * r + GREEN * g + BLUE * b


@compiled
def _load(red, green, blue, r, g, b):
    for i in range(r.size):
        r[i] = np.float32(red[i]) / WHITE
    for i in range(g.size):
        g[i] = np.float32(green[i]) / WHITE
    for i in range(b.size):
        b[i] = np.float32(blue[i]) / WHITE


@compiled
def _adjust(part, parameters, r, g, b):
    """One part of the colour jitter, of those that need no more than a pixel."""
    factor = parameters[part]
    if part == HUE:
        if factor != ZERO:
            _hue(factor, r, g, b)
    elif factor != ONE:
        if part == SATURATION:
            _saturation(factor, r, g, b)
        elif part != CONTRAST:
            _brightness(factor, r, g, b)


@compiled
def _brightness(factor, r, g, b):
    for i in range(r.size):
        r[i], g[i], b[i] = _clip(r[i] * factor), _clip(g[i] * factor), _clip(b[i] * factor)


@compiled
def _contrast(middle, factor, r, g, b):
    for i in range(r.size):
        r[i] = _clip(middle + factor * (r[i] - middle))
        g[i] = _clip(middle + factor * (g[i] - middle))
        b[i] = _clip(middle + factor * (b[i] - middle))


@compiled
def _saturation(factor, r, g, b):
    for i in range(r.size):
        grey = _grey(r[i], g[i], b[i])
        r[i] = _clip(grey + factor * (r[i] - grey))
        g[i] = _clip(grey + factor * (g[i] - grey))
        b[i] = _clip(grey + factor * (b[i] - grey))


@compiled
def _hue(shift, r, g, b):
    turn = SIX * shift
    for i in range(r.size):
        red, green, blue = r[i], g[i], b[i]
        value = max(max(red, green), blue)
        chroma = value - min(min(red, green), blue)
        reds, greens = value == red, value == green
        rise = (green - blue) if reds else ((blue - red) if greens else (red - green))
        corner = ZERO if reds else (TWO if greens else FOUR)
        hue = corner + rise / (chroma if chroma > ZERO else ONE) + turn
        hue -= SIX * np.floor(hue / SIX)
        r[i] = value - chroma * _fall(hue + np.float32(5))
        g[i] = value - chroma * _fall(hue + np.float32(3))
        b[i] = value - chroma * _fall(hue + np.float32(1))


@compiled
def _fall(k):
    """By how much of the chroma a channel lies below the value, k sextants of hue away."""
    k = k - SIX if k >= SIX else k
    return _clip(min(k, FOUR - k))


@compiled
def _grey_sum(r, g, b):
    total = ZERO
    for i in range(r.size):
        total += _grey(r[i], g[i], b[i])
    return total


@compiled
def _finish(parameters, sharp, mean, scale, r, g, b):
    """What follows the jitter; of an image to be blurred, only what comes before that."""
    if parameters[GREY] != ZERO:
        for i in range(r.size):
            grey = _grey(r[i], g[i], b[i])
            r[i], g[i], b[i] = grey, grey, grey
    if sharp:
        _normalise(parameters, mean, scale, r, g, b)


@compiled
def _normalise(parameters, mean, scale, r, g, b):
    if parameters[SOLARISE] != ZERO:
        for i in range(r.size):
            r[i] = r[i] if r[i] < HALF else ONE - r[i]
            g[i] = g[i] if g[i] < HALF else ONE - g[i]
            b[i] = b[i] if b[i] < HALF else ONE - b[i]
    for i in range(r.size):
        r[i], g[i], b[i] = (r[i] - mean[0]) * scale[0], (g[i] - mean[1]) * scale[1], (b[i] - mean[2]) * scale[2]


@compiled
def _gaussian(sigma, size):
    """The centre and one side of the blur's weights, cut at three sigma or at the image's own size."""
    radius = min(int(np.ceil(np.float32(3) * sigma)), size - 1)
    weights = np.empty(radius + 1, np.float32)
    total = 0.0
    for k in range(radius + 1):
        weights[k] = np.exp(-0.5 * (k / sigma) ** 2)
        total += weights[k] if k == 0 else 2.0 * weights[k]
    for k in range(radius + 1):
        weights[k] /= np.float32(total)
    return weights


@compiled
def _blur_rows(source, weights, out):
    """Along the rows of (S, S), reflected at their ends."""
    size, radius = source.shape[1], weights.size - 1
    padded = np.empty(size + 2 * radius, np.float32)
    flat = out.ravel()
    for y in range(size):
        padded[radius : radius + size] = source[y]
        for k in range(1, radius + 1):
            padded[radius - k] = source[y, k]
            padded[radius + size - 1 + k] = source[y, size - 1 - k]
        for k in range(radius + 1):
            _add_pair(padded, radius - k, radius + k, k == 0, weights[k], flat, y * size, size)


@compiled
def _blur_columns(source, weights, out):
    """Down the columns of (S, S), reflected at their ends."""
    size = source.shape[0]
    flat, result = source.ravel(), out.ravel()
    for y in range(size):
        for k in range(weights.size):
            above, below = abs(y - k), size - 1 - abs(size - 1 - y - k)
            _add_pair(flat, above * size, below * size, k == 0, weights[k], result, y * size, size)


@compiled
def _add_pair(values, left, right, centre, weight, out, at, count):
    """Add ``count`` weighted values from ``left`` on and from ``right`` on to ``out`` from ``at`` on; the centre starts the sum.

    Unsigned offsets: numba would test signed ones for being negative, and not vectorise.
    """
    i, j, k = np.uintp(left), np.uintp(right), np.uintp(at)
    if centre:
        for x in range(np.uintp(count)):
            out[k + x] = weight * values[i + x]
    else:
        for x in range(np.uintp(count)):
            out[k + x] += weight * (values[i + x] + values[j + x])
