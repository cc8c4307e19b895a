"""The batches that features are measured on: one centred view an image, no augmentation, through the training loader."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...common.augment import augment
from ...common.beton import Beton
from ...common.loader import LoaderConfig, ViewLoader, ViewSet
from ...common.views import evaluation_recipe

SMALL_SIDE = 64
"""Data sets whose images are at most this many pixels a side are seen whole; from others 7/8 of the shorter side is cut,
as usual.
"""


def evaluation_batches(
    data: Beton, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, loader: LoaderConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Image ids (B,) int64 and normalised images (B, 3, size, size) float32 on the device, in row order."""
    small = max(int(data.heights.max()), int(data.widths.max())) <= SMALL_SIDE
    views = ViewLoader(data, evaluation_recipe(1.0 if small else 0.875), 0, loader)
    mean_, std_ = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    for batch in views.epoch(np.arange(data.num_images), [ViewSet((0,), size)]):
        pixels = batch.views[0].to(device).flatten(0, 1)
        yield torch.from_numpy(batch.image_ids.copy()), augment(pixels, batch.colour[0].flatten(0, 1), 1.0, mean_, std_)
