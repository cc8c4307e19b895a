"""Planes to views in plain torch, on any device: the reference of ``kernel.py``, and its stand-in where there is no GPU."""

import math

import torch
from torch import Tensor

from .colours import apply_colours_torch
from .drawing import CROP_HEIGHT, CROP_WIDTH, FLIP, LEFT, TOP
from .planes import FACTOR_X, FACTOR_Y, HEIGHT, KIND, SCALE, WIDTH, YCC, Planes


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
    """The views first .. first + n of every image, as the network takes them.

    planes: on any device. colour: their part (B, n, 8) of ``planes.colour``, on the CPU. size, blur_scale, mean, std: as for
    ``apply_colours``; mean and std are on the planes' device. Returns (B, n, 3, size, size) of ``dtype``.
    """
    layout, starts, geometry = (t.tolist() for t in (planes.layout, planes.starts, planes.geometry))
    resized = [
        [
            _resized(planes.pixels[start:], row, view, size, planes.cubic)
            for view in crops[first : first + colour.shape[1]]
        ]
        for start, row, crops in zip(starts[:-1], layout, geometry, strict=True)
    ]
    images = torch.stack([view for image in resized for view in image])
    return (
        apply_colours_torch(images, colour.flatten(0, 1), blur_scale, mean, std)
        .to(dtype)
        .unflatten(0, colour.shape[:2])
    )


def _resized(pixels: Tensor, layout: list[int], geometry: list[int], size: int, cubic: bool) -> Tensor:
    """One view before its colours: (3, size, size) float32, RGB from 0 to 255."""
    top, left, box_height, box_width = (geometry[n] / layout[SCALE] for n in (TOP, LEFT, CROP_HEIGHT, CROP_WIDTH))
    planes, at = [], 0
    for factor_y, factor_x in ((1, 1), (layout[FACTOR_Y], layout[FACTOR_X]), (layout[FACTOR_Y], layout[FACTOR_X])):
        height, width = layout[HEIGHT] // factor_y, layout[WIDTH] // factor_x
        plane = pixels[at : at + height * width].view(height, width).float()
        down = _weights(top / factor_y, box_height / factor_y, height, size, factor_y, cubic).to(plane)
        along = _weights(left / factor_x, box_width / factor_x, width, size, factor_x, cubic).to(plane)
        planes.append(down @ plane @ (along.flip(0) if geometry[FLIP] else along).T)
        at += height * width
    if layout[KIND] == YCC:  # JFIF's full range
        luma, blue, red = planes[0], planes[1] - 128, planes[2] - 128
        planes = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return torch.stack(planes).clamp_(0, 255)


def _weights(start: float, length: float, limit: int, size: int, factor: int, cubic: bool) -> Tensor:
    """(size, limit) float64: by which weights source pixels make the view's. The filter that ``resize._filter`` explains."""
    scale = length / size
    support = max(scale, 1.0) if factor == 1 or cubic else math.hypot(1.0, max(scale, 1 / factor))
    centres = start + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    taps = torch.arange(limit, dtype=torch.float64)
    distance = (taps + 0.5 - centres[:, None]).abs() / support
    weights = keys_cubic(distance) if cubic and (factor == 1 or scale > 1) else (1 - distance).clamp_(min=0)
    weights *= (taps >= math.floor(start)) & (taps < math.ceil(start + length))
    return weights / weights.sum(1, keepdim=True)


def keys_cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2 (1981, eq. 15), Pillow's bicubic: 0 from a distance of 2 on."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
