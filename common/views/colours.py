"""Colour, grey, blur and solarise of a batch of views, on any device, from the parameters that ``drawing`` drew.

Every operation works a sample at a time in effect, so a view looks the same whatever batch it is in. The order is that
of the papers' code: colour jitter (its four parts in a drawn order), grey, blur, solarise, normalise. The formulas are
torchvision's (``torchvision.transforms.functional``), with one factor a sample.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from .colours_compiled import ORDERS, apply_colours_compiled
from .drawing import BRIGHTNESS, CONTRAST, GREY, HUE, ORDER, SATURATION, SIGMA, SOLARISE

SOLARISE_FROM = 128 / 255


def apply_colours(
    images: Tensor, colour: Tensor, blur_scale: float, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Views as the network takes them.

    images: (N, 3, S, S) uint8, any strides. colour: (N, 8) float32 on the CPU (``ViewParameters.colour``). blur_scale: S
    over the size that the recipe's blur radii refer to. mean, std: (3,) of the network's input, in [0, 1] units, on the
    images' device. Returns (N, 3, S, S) of ``dtype``, contiguous, on CUDA channels last.

    On a CPU this is compiled code (``colours_compiled.py``), nine times as fast as the torch formulas, and equal to a few 1e-6;
    on CUDA it is ``kernel_colours.py``, which rounds what it blurs to float16.
    """
    if images.device.type == "cuda" and _has_triton():
        from .kernel_colours import apply_colours_triton

        return apply_colours_triton(images, colour, blur_scale, mean, std, dtype)
    in_torch = apply_colours_compiled if images.device.type == "cpu" else apply_colours_torch
    return in_torch(images, colour, blur_scale, mean, std).to(dtype)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def apply_colours_torch(images: Tensor, colour: Tensor, blur_scale: float, mean: Tensor, std: Tensor) -> Tensor:
    """``apply_colours`` in torch operations, for other devices and as the reference."""
    x = images.to(torch.float32).div_(255).contiguous()
    order = torch.from_numpy(ORDERS)[colour[:, ORDER].long()]
    parts: tuple[tuple[int, float, Callable[[Tensor, Tensor], Tensor]], ...] = (
        (BRIGHTNESS, 1.0, adjust_brightness),
        (CONTRAST, 1.0, adjust_contrast),
        (SATURATION, 1.0, adjust_saturation),
        (HUE, 0.0, adjust_hue),
    )
    for position in range(4):
        for part, neutral, adjust in parts:
            rows = (order[:, position] == part) & (colour[:, part] != neutral)
            x = _apply(x, rows, adjust, colour[:, part])
    x = _apply(x, colour[:, GREY] != 0, lambda v, _: grey(v).expand_as(v), colour[:, GREY])
    sigma = colour[:, SIGMA] * blur_scale
    radius = math.ceil(3 * float(sigma.max())) if len(sigma) else 0
    x = _apply(x, sigma != 0, lambda v, s: gaussian_blur(v, s, radius), sigma)
    x = _apply(x, colour[:, SOLARISE] != 0, lambda v, _: solarise(v), colour[:, SOLARISE])
    return x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def _apply(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], factors: Tensor) -> Tensor:
    """Apply ``operation`` to the chosen rows of x. They are chosen on the CPU, so no device is waited for."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        factors = factors[rows].to(x.device, non_blocking=True).view(-1, 1, 1, 1)
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = operation(x[rows], factors)
    return x


def grey(x: Tensor) -> Tensor:
    """ITU-R 601 luma: (N, 3, S, S) in [0, 1] to (N, 1, S, S)."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def solarise(x: Tensor) -> Tensor:
    """Invert what is 128 or brighter (in steps of 255), as Pillow does."""
    return torch.where(x < SOLARISE_FROM, x, 1 - x)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, factor).clamp_(0, 1)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, grey(x).expand_as(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by ``shift`` turns in HSV space."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = (hue + 6 * shift[:, :, :, 0]) % 6
    # A channel falls linearly from the value by the chroma as the hue moves away from it (Smith 1978, without the case split).
    offsets = _channel_offsets(x.device)
    k = (offsets + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


@cache
def _channel_offsets(device: torch.device) -> Tensor:
    """Copied there once: a copy in every call would have the host wait for the device each time."""
    with torch.inference_mode(False):
        return torch.tensor([5.0, 3.0, 1.0], device=device).view(1, 3, 1, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own sigma, in pixels (N, 1, 1, 1); reflected at the border, cut at three sigma or ``radius``.

    Shifts and adds instead of a convolution: the same sum in the same order whatever the batch, and no call to pick an
    algorithm.
    """
    radius = min(radius, x.shape[-1] - 1)
    for axis in (-1, -2):
        pad = (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius)
        padded, size = F.pad(x, pad, mode="reflect"), x.shape[axis]
        x, total = torch.zeros_like(x), 0.0
        for k in range(-radius, radius + 1):
            weight = torch.exp(-0.5 * (k / sigma) ** 2) * (abs(k) < 3 * sigma + 1)
            x.addcmul_(padded.narrow(axis, k + radius, size), weight)
            total = total + weight
        x.div_(total)
    return x
