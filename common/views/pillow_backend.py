"""The plain loader: Pillow in a torch DataLoader.

It is the tests' truth for the geometry, and runs where ffcv cannot be built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..errors import FailureError
from ..images.beton import Beton
from ..shared_memory import shared_memory_holds
from .batch import Batch, ViewSet
from .drawing import CROP_HEIGHT, CROP_WIDTH, FLIP, LEFT, TOP, view_parameters
from .recipes import Recipe

GEOMETRY = "pillow"
"""Name of this way to resize in a store's manifest."""
PREFETCHED = 2
"""Batches that each worker of a DataLoader makes ahead."""


@dataclass(frozen=True)
class PillowBackend:
    """Makes batches in ``workers`` processes, or in the caller's when it is 1."""

    data: Beton
    recipe: Recipe
    seed: int
    batch_size: int
    workers: int

    def epoch(self, order: np.ndarray, sets: Sequence[ViewSet]) -> Iterator[Batch]:
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        workers = min(self.workers, len(batches)) if self.workers > 1 else 0
        # An item is a whole batch, so there is nothing to sample and nothing to collate.
        a_batch = self.batch_size * sum(len(s.ids) * 3 * s.size**2 for s in sets)
        piped = not shared_memory_holds(a_batch * (PREFETCHED * workers + 2))
        dataset = _Batches(self.data, self.recipe, self.seed, tuple(sets), batches, piped and workers > 0)
        # A DataLoader draws a seed for its workers; from torch's own generator, a resumed epoch would differ.
        unused = torch.Generator()
        loading = DataLoader(
            dataset, batch_size=None, num_workers=workers, collate_fn=_unchanged, generator=unused,
            prefetch_factor=PREFETCHED if workers else None,
        )  # fmt: skip
        try:
            for batch in loading:
                if isinstance(
                    batch, FailureError
                ):  # raised here: torch would wrap a worker's exception in its traceback
                    raise batch
                yield _unpacked(batch) if isinstance(batch, tuple) else batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise FailureError(
                "a process that loads images was killed, most often for want of memory: take fewer `workers` or a smaller "
                "`batch_size`"
            ) from error


def _packed(batch: Batch) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """A batch that goes through a pipe: tensors would go through shared memory."""
    return batch.image_ids, tuple(v.numpy() for v in batch.views), tuple(c.numpy() for c in batch.colour)


def _unpacked(packed: tuple[np.ndarray, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]) -> Batch:
    image_ids, views, colour = packed
    return Batch(image_ids, tuple(map(torch.from_numpy, views)), tuple(map(torch.from_numpy, colour)))


def _unchanged(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class _Batches(Dataset):
    data: Beton
    recipe: Recipe
    seed: int
    sets: tuple[ViewSet, ...]
    batches: list[np.ndarray]
    piped: bool = False

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        batch = self._make(number)
        return _packed(batch) if self.piped and isinstance(batch, Batch) else batch

    def _make(self, number: int) -> Batch | FailureError:
        ids = self.batches[number]
        heights, widths = self.data.heights[ids, None], self.data.widths[ids, None]
        drawn = [
            view_parameters(self.recipe, self.seed, ids[:, None], np.array(s.ids), heights, widths) for s in self.sets
        ]
        views = [np.empty((len(ids), len(s.ids), 3, s.size, s.size), np.uint8) for s in self.sets]
        for b, image_id in enumerate(ids.tolist()):
            try:
                image = self.data.picture(image_id)
            except FailureError as error:
                return error
            for crops, parameters in zip(views, drawn, strict=True):
                for v, geometry in enumerate(parameters.geometry[b].tolist()):
                    crops[b, v] = resize_view(image, geometry, crops.shape[-1], self.recipe.cubic).transpose(2, 0, 1)
        return Batch(
            ids,
            tuple(map(torch.from_numpy, views)),
            tuple(torch.from_numpy(p.colour) for p in drawn),
        )


def resize_view(image: Image.Image, geometry: Sequence[int], size: int, cubic: bool = False) -> np.ndarray:
    """(size, size, 3) uint8: crop, antialiased resize, flip. ``geometry`` is one row of ViewParameters."""
    top, left = geometry[TOP], geometry[LEFT]
    box = (left, top, left + geometry[CROP_WIDTH], top + geometry[CROP_HEIGHT])
    crop = image.crop(box).resize((size, size), Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR)
    return np.asarray(crop)[:, ::-1] if geometry[FLIP] else np.asarray(crop)
