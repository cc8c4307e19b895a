"""Decoded photographs for the tests of the view kernels."""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from rob.common.images.beton import JPEG, RAW
from rob.common.views import drawing
from rob.common.views.pillow_backend import resize_view
from rob.common.views.planes import Planes
from rob.common.views.resize import resize_views

from .stored_images import SUBSAMPLING, decoded, jpeg, planes_of

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
RAW_COLOUR = torch.zeros(3), torch.ones(3)
"""Mean and deviation that leave values in [0, 1]."""

JPEGS = ("4:4:4", "4:2:2", "4:2:0", "grey")
STORED = (*JPEGS, "raw")

ALL = {"BRIGHTNESS": 1.3, "CONTRAST": 0.6, "SATURATION": 1.5, "HUE": 0.12}
JITTERS: dict[str, dict[str, float]] = {
    "brightness": {"BRIGHTNESS": 1.4},
    "contrast": {"CONTRAST": 1.6},
    "saturation": {"SATURATION": 0.4},
    "hue": {"HUE": -0.3},
    "grey": {"GREY": 1},
    "solarise": {"SOLARISE": 1},
    "a small blur": {"SIGMA": 0.4},
    "a large blur": {"SIGMA": 4.0},
    **{f"order {order}": {**ALL, "ORDER": order} for order in (0, 5, 9, 14, 18, 23)},
    "everything": {**ALL, "ORDER": 11, "GREY": 1, "SIGMA": 1.1, "SOLARISE": 1},
}


def neutral(count: int, **columns: float) -> Tensor:
    """(1, count, 8): parameters that change nothing but the named columns."""
    colour = torch.tensor(drawing.UNCHANGED).repeat(1, count, 1)
    for name, value in columns.items():
        colour[..., getattr(drawing, name)] = value
    return colour


def psnr(a: Tensor, b: Tensor) -> float:
    """Of values from 0 to 255."""
    return float(10 * torch.log10(255**2 / (a - b).square().mean().clamp(min=1e-9)))


def photograph() -> np.ndarray:
    return load_sample_images().images[0]


def cases(stored: str, scale: int, cubic: bool = False) -> tuple[Image.Image, list[list[int]], int, Planes]:
    """A photograph as stored, three crops of it, the size of their views, and its planes decoded at 1/scale. A view of 40 pixels
    is four tiles, of 20 one."""
    pixels = photograph()[:, : 640 - scale]
    size = 40 if scale < 4 and stored == "4:2:0" else 20
    height, width = pixels.shape[:2]
    if stored == "grey":  # packed as the loader packs it: three equal channels
        pixels = np.repeat(pixels[..., 1:2], 3, 2)
    if stored == "raw":
        data, mode, image = np.ascontiguousarray(pixels).ravel(), RAW, Image.fromarray(pixels)
    else:
        data, mode = jpeg(pixels, subsampling=SUBSAMPLING.get(stored, 2)), JPEG
        image = Image.fromarray(decoded(data))
    side = min(2 * scale * size, height)
    geometry = [[11, 101, 401, 333, 1] if scale > 2 else [height - side, 101, side, side + 7, 1]]
    geometry += [[0, 0, height, width, 0] if scale > 2 else [33, 57, 2 * scale * size, 2 * scale * size + 9, 0]]
    if scale == 1:
        geometry += [[33, 57, size // 2 + 1, 3 * size // 4, 0]]  # enlarged
    planes, starts, layout = planes_of(data, mode, height, width, 1 if stored == "raw" else scale)
    arrays = (planes, starts, layout, np.array([geometry], np.int32))
    return image, geometry, size, Planes(*map(torch.from_numpy, arrays), neutral(len(geometry)), cubic)


def pillow_views(image: Image.Image, geometry: list[list[int]], size: int, cubic: bool) -> list[Tensor]:
    """Each (3, size, size) float32, 0 to 255."""
    return [torch.tensor(resize_view(image, box, size, cubic).copy()).permute(2, 0, 1).float() for box in geometry]


def resized_on_cpu(planes: Planes, size: int) -> Tensor:
    """(V, 3, size, size) float32, 0 to 255: the CPU path's views of the one image of ``planes``."""
    count = planes.geometry.shape[1]
    out, sizes = np.empty(count * 3 * size**2, np.uint8), np.full(count, size)
    places = np.stack([np.arange(count) * 3 * size**2, np.zeros(count, np.int64)], 1)
    pixels, starts, layout, geometry = (t.numpy() for t in planes.tensors()[:4])
    resize_views(pixels, starts, layout, geometry, sizes, places, 0, planes.cubic, out)
    return torch.from_numpy(out).view(count, 3, size, size).float()


def stored_photograph(columns: dict[str, float]) -> tuple[Planes, Tensor]:
    """One view of a photograph, and these colours."""
    _, geometry, _, planes = cases("4:2:0", 4)
    colour = neutral(1, **columns)
    crop = torch.tensor([[geometry[0]]], dtype=torch.int32)
    return Planes(planes.pixels, planes.starts, planes.layout, crop, colour), colour


def batch_of_two() -> tuple[Planes, Tensor]:
    """Two photographs, one JPEG and one raw, of four views each, and the colours of the last three."""
    random = np.random.default_rng(0)
    parts = [cases("4:2:2", 2)[3], cases("raw", 2)[3]]
    pixels = torch.cat([part.pixels for part in parts])
    starts = torch.tensor([0, len(parts[0].pixels), len(pixels)])
    boxes = [[random.integers(0, 200), random.integers(0, 300), *random.integers(20, 200, 2), v % 2] for v in range(8)]
    geometry = torch.tensor(np.array(boxes, np.int32)).view(2, 4, 5)
    colour = neutral(4).repeat(2, 1, 1)
    colour[0, 1, drawing.SIGMA], colour[1, 3, drawing.SIGMA], colour[1, 2, drawing.CONTRAST] = 1.0, 0.7, 0.5
    colour[0, 3, drawing.GREY], colour[1, 1, drawing.HUE] = 1, 0.2
    return Planes(pixels, starts, torch.cat([part.layout for part in parts]), geometry, colour), colour[:, 1:]
