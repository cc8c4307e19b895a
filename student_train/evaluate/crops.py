"""Random crops and flips of labelled images: what a classifier is trained on."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...common.images.beton import Beton
from ...common.views.loader import LoaderConfig, ViewLoader
from ...common.views.recipes import Crop, Recipe
from .network import FrozenNetwork

CROPS_AND_FLIPS = Recipe("crops and flips", (Crop(224, (0.08, 1.0), flip=0.5),), num_global=1)
"""Of DINO's linear evaluation: torchvision's RandomResizedCrop and a flip."""


class RandomCrops:
    """Crops as ``network`` takes them, drawn anew every epoch, as a pure function of ``seed`` and the epoch."""

    def __init__(
        self, network: FrozenNetwork, data: Beton, loader: LoaderConfig, seed: int, recipe: Recipe = CROPS_AND_FLIPS
    ) -> None:
        self.network, self.seed = network, seed
        recipe = replace(recipe, interpolation=network.interpolation)
        self.views = ViewLoader(data, recipe, seed, loader)

    def epoch(self, image_ids: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``FrozenNetwork.batches`` of ``image_ids`` (N,) in an order of this epoch's own."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = image_ids.cpu()[torch.randperm(len(image_ids), generator=generator)].numpy()
        return self.network.batches(self.views, order, epoch)
