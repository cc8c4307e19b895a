"""What an exported network takes: a picture as it lies in memory, or floats, normalised inside the graph or before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class WithInput(nn.Module):
    """A backbone behind its normalisation: ``image`` in the given form -> features (N, D) float32.

    ``uint8``: (N, S, S, 3), RGB, 0..255. ``unit``: (N, 3, S, S) float32, 0..1. ``normalised``: the backbone's own input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, form: str, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.form, self.size = backbone, form, size
        scale = 255 if form == "uint8" else 1
        self.register_buffer("mean", scale * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", scale * torch.tensor(std).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        if self.form == "normalised":
            return self.backbone(image)
        channels_first = image.permute(0, 3, 1, 2).float() if self.form == "uint8" else image
        return self.backbone((channels_first - self.mean) / self.std)

    def prepare(self, pixels: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 pixels as ``forward`` takes them."""
        return prepare(pixels, self.form, self.mean, self.std)


def prepare(pixels: Tensor, form: str, mean: Tensor, std: Tensor) -> Tensor:
    """(N, S, S, 3) uint8 pixels in one of the forms; mean, std: (3, 1, 1), in units of 1, for ``normalised``."""
    if form == "uint8":
        return pixels.contiguous()
    unit = (pixels.permute(0, 3, 1, 2).float() / 255).contiguous()
    return unit if form == "unit" else (unit - mean) / std


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undoes the normalisation of (N, 3, S, S) images that were 8-bit: (N, S, S, 3) uint8."""
    means, stds = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return ((images * stds + means) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
