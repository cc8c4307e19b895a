"""Decoded images as planes of bytes, and on their way to a GPU, which makes the views itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUT_COLUMNS = 6
KIND, SCALE, HEIGHT, WIDTH, FACTOR_Y, FACTOR_X = range(LAYOUT_COLUMNS)
"""Columns of a layout row: what ``decode_planes`` made of an image.

Three planes lie one behind another without gaps: (HEIGHT, WIDTH), then twice (HEIGHT / FACTOR_Y, WIDTH / FACTOR_X).
SCALE is by how much the stored image is larger than the first plane.
"""

UNDECODED, YCC, RGB = range(3)
"""Values of KIND. YCC planes are JFIF's full-range YCbCr."""

SLACK = 64
"""Bytes behind an image's planes that belong to none: vector loads may run past the last one."""


@dataclass(frozen=True, eq=False)
class Planes:
    """Decoded images, and where their views lie in them: what a GPU makes the views from.

    pixels: (bytes,) uint8, of ``decode_planes``: the images' planes, one behind another; starts: (B + 1,) int64 and layout:
    (B, 6) int32, where and what each is. geometry: (B, V, 5) int32 and colour: (B, V, 8) float32, the ViewParameters of all
    sets' views side by side. cubic: which filter the views are made with.
    """

    pixels: Tensor
    starts: Tensor
    layout: Tensor
    geometry: Tensor
    colour: Tensor
    cubic: bool = False

    def tensors(self) -> list[Tensor]:
        return [self.pixels, self.starts, self.layout, self.geometry, self.colour]

    def to(self, device: torch.device) -> "Planes":
        return Planes(*(moved(tensor, device) for tensor in self.tensors()), cubic=self.cubic)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """From wherever it is to ``device``, unwaited for: of memory that is not page-locked more than 64 KB are copied only when
    all that is queued before is done, and the host waits for that."""
    lock = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if lock else values).to(device, non_blocking=True)
