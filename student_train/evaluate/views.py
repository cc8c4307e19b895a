"""The batches that networks are measured on, through the training loader: one view an image."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...common.images.beton import Beton
from ...common.views.loader import LoaderConfig, ViewLoader, ViewSet
from ...common.views.recipes import Crop, Recipe, evaluation_recipe

SMALL_SIDE = 64
"""Data sets whose images are at most this many pixels a side are seen whole; from others 7/8 of the shorter side is cut,
as usual.
"""

CROPS_AND_FLIPS = Recipe("crops and flips", (Crop(224, (0.08, 1.0), flip=0.5),), num_global=1)
"""What a classifier is trained on in DINO's linear evaluation: torchvision's RandomResizedCrop and a flip."""


def evaluation_batches(
    data: Beton,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    loader: LoaderConfig,
    image_ids: np.ndarray | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Centred views of ``image_ids`` (of all, in row order): ids (B,) int64 and normalised images (B, 3, size, size)
    float32 on the device.
    """
    small = max(int(data.heights.max()), int(data.widths.max())) <= SMALL_SIDE
    views = ViewLoader(data, evaluation_recipe(1.0 if small else 0.875), 0, loader)
    order = np.arange(data.num_images) if image_ids is None else image_ids
    return _normalised(views, order, ViewSet((0,), size), mean, std, device)


class TrainingBatches:
    """Random crops and flips of labelled images, drawn anew every epoch, as a pure function of ``seed`` and the epoch."""

    def __init__(
        self,
        data: Beton,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        loader: LoaderConfig,
        seed: int,
    ) -> None:
        self._views = ViewLoader(data, CROPS_AND_FLIPS, seed, loader)
        self._rest = (mean, std, device)
        self._size, self._seed = size, seed

    def epoch(self, image_ids: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``evaluation_batches``, of ``image_ids`` (N,) in an order of this epoch's own."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = image_ids.cpu()[torch.randperm(len(image_ids), generator=generator)].numpy()
        return _normalised(self._views, order, ViewSet((epoch,), self._size), *self._rest)


def _normalised(
    views: ViewLoader,
    order: np.ndarray,
    view: ViewSet,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    mean_, std_ = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    for batch in views.epoch(order, [view]):
        images = batch.to(device).augment(0, 1.0, mean_, std_).flatten(0, 1)
        yield torch.from_numpy(batch.image_ids.copy()), images
