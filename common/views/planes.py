"""Decoded images on their way to a GPU, which makes the views itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return Planes(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()), cubic=self.cubic)
