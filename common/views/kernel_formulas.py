"""The formulas of ``colours.py`` on a GPU, in Triton: what the kernels have in common.

Contrast needs the mean of a whole view, which is many programs: a first pass leaves each tile's grey sum. A view to be blurred is
kept in float16 for ``blur_kernel``, which solarises and normalises it.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import drawing
from .colours_compiled import ORDERS

_BRIGHTNESS, _CONTRAST = tl.constexpr(drawing.BRIGHTNESS), tl.constexpr(drawing.CONTRAST)
_SATURATION, _HUE, _ORDER = tl.constexpr(drawing.SATURATION), tl.constexpr(drawing.HUE), tl.constexpr(drawing.ORDER)
_GREY, _SOLARISE = tl.constexpr(drawing.GREY), tl.constexpr(drawing.SOLARISE)


def places_of(sigma: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Of views with these blurs (N,), on the CPU: the row (N,) int32 of each in what is kept for the blur, else -1, on
    ``device``; and how many rows there are."""
    blurred = sigma != 0
    places = torch.where(blurred, blurred.cumsum(0) - 1, -1).to(device, torch.int32, non_blocking=True)
    return places, int(blurred.sum())


def channels_last(views: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(views, 3, size, size), as cuDNN wants it: a pixel's channels side by side."""
    return torch.empty(views, size, size, 3, dtype=dtype, device=device).permute(0, 3, 1, 2)


@cache
def orders_on(device: torch.device) -> Tensor:
    """(24, 4) int32: which part of the jitter comes first, second ..."""
    with torch.inference_mode(False):
        return torch.from_numpy(ORDERS).to(device, torch.int32)


# --- the formulas, on a tile's red, green and blue ---


@triton.jit
def clip(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _grey(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _blended(r, g, b, other, factor):
    return clip(other + factor * (r - other)), clip(other + factor * (g - other)), clip(other + factor * (b - other))


@triton.jit
def _fall(k):
    """By how much of the chroma a channel lies below the value, k sextants of hue away."""
    k = tl.where(k >= 6.0, k - 6.0, k)
    return clip(tl.minimum(k, 4.0 - k))


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
def normalised(channel, solarise, mean, std, number):
    if solarise != 0.0:
        channel = tl.where(channel < 128 / 255, channel, 1.0 - channel)
    return (channel - tl.load(mean + number)) / tl.load(std + number)


@triton.jit
def _store(out, place, r, g, b, inside, stride):
    """``place``: of the pixels in the first of three channels, which lie ``stride`` apart."""
    tl.store(out + place, r, inside)
    tl.store(out + stride + place, g, inside)
    tl.store(out + 2 * stride + place, b, inside)


@triton.jit
def coloured(
    r, g, b, colour, orders, sums, program, view, tiles, inside, area, MEASURE: tl.constexpr, TILES: tl.constexpr
):
    """The jitter, whose parts come in the view's own order. To MEASURE is to leave the tile's grey sum, just before contrast."""
    orders += tl.load(colour + _ORDER).to(tl.int32) * 4
    for position in range(4):
        part = tl.load(orders + position)
        factor = tl.load(colour + part)
        if part == _HUE:
            if factor != 0.0:
                r, g, b = _hue_shifted(r, g, b, factor)
        elif factor != 1.0:
            if part == _BRIGHTNESS:
                r, g, b = clip(r * factor), clip(g * factor), clip(b * factor)
            elif part == _SATURATION:
                r, g, b = _blended(r, g, b, _grey(r, g, b), factor)
            elif MEASURE:
                tl.store(sums + program, tl.sum(tl.where(inside, _grey(r, g, b), 0.0)))
            else:
                each = tl.arange(0, TILES)
                total = tl.sum(tl.load(sums + view * tiles + each, each < tiles, 0.0))
                r, g, b = _blended(r, g, b, total / area, factor)
    return r, g, b


@triton.jit
def finish(r, g, b, colour, places, mean, std, kept, out, view, pixel, inside, area):
    """Grey, solarise, normalise and store, a pixel's channels side by side; or grey and keep what is to be blurred."""
    if tl.load(colour + _GREY) != 0.0:
        grey = _grey(r, g, b)
        r, g, b = grey, grey, grey
    place = tl.load(places + view)
    if place >= 0:
        _store(kept + place.to(tl.int64) * 3 * area, pixel, r, g, b, inside, area)
    else:
        solarise = tl.load(colour + _SOLARISE)
        r, g = normalised(r, solarise, mean, std, 0), normalised(g, solarise, mean, std, 1)
        b = normalised(b, solarise, mean, std, 2)
        _store(out + view.to(tl.int64) * 3 * area, 3 * pixel, r, g, b, inside, 1)
