"""Image ids to batches, in compiled code on threads: views made on the CPU, or planes for a GPU to make them from."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import numpy as np
import torch
from PIL import Image

from ..images.beton import RAW, Beton
from .batch import Batch, Slot, ViewSet
from .decode import decode_planes, decode_scales, decoder_handle, plane_starts, split_pixels
from .drawing import COLOUR_COLUMNS, view_parameters
from .planes import KIND, LAYOUT_COLUMNS, SCALE, UNDECODED, Planes
from .recipes import Recipe
from .resize import resize_views

BATCHES_AHEAD = 3
"""Batches that may wait for the consumer."""


class ViewFetcher:
    """Image ids to a Batch of views, on ``threads`` threads; the memory of a batch is used again BATCHES_AHEAD + 2
    batches later.

    Raises FailureError when an image cannot be decoded.
    """

    def __init__(self, data: Beton, recipe: Recipe, seed: int, batch_size: int, threads: int) -> None:
        self.data, self.recipe, self.seed, self.batch_size, self.threads = data, recipe, seed, batch_size, threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        self.thread = threading.local()
        self.sets: tuple[ViewSet, ...] = ()

    def set_views(self, sets: Sequence[ViewSet]) -> None:
        """Choose the views of the batches to come."""
        if tuple(sets) == self.sets:
            return
        self.sets = tuple(sets)
        self.view_ids = np.array([i for s in sets for i in s.ids], np.int64)
        self.sizes = np.array([s.size for s in sets for _ in s.ids], np.int64)
        set_bytes = [self.batch_size * len(s.ids) * 3 * s.size**2 for s in sets]
        self.set_starts = np.concatenate([[0], np.cumsum(set_bytes, dtype=np.int64)])
        # Of each view, where the first image's begins and how many bytes further the next image's.
        self.starts = np.array(
            [
                (start + v * 3 * s.size**2, len(s.ids) * 3 * s.size**2)
                for start, s in zip(self.set_starts, sets, strict=False)
                for v in range(len(s.ids))
            ],
            np.int64,
        )
        slots = [self._slot() for _ in range(BATCHES_AHEAD + 2)]  # those waiting, one being made, one at the consumer
        self.slots = cycle(slots)

    def _slot(self) -> Slot:
        return Slot(_bytes(int(self.set_starts[-1])), self._colour_memory())

    def _colour_memory(self) -> torch.Tensor:
        return torch.empty(self.batch_size, len(self.view_ids), COLOUR_COLUMNS)

    def __call__(self, image_ids: np.ndarray) -> Batch:
        slot = next(self.slots)
        if slot.copied is not None:
            slot.copied.synchronize()
        heights, widths = self.data.heights[image_ids, None], self.data.widths[image_ids, None]
        drawn = view_parameters(self.recipe, self.seed, image_ids[:, None], self.view_ids, heights, widths)
        slot.colour.numpy()[: len(image_ids)] = drawn.colour
        return self._fill(slot, image_ids, drawn.geometry)

    def _fill(self, slot: Slot, image_ids: np.ndarray, geometry: np.ndarray) -> Batch:
        """The Batch of these images, made in the slot's memory; geometry: (B, V, 5)."""

        def decode_and_resize(some: slice) -> None:
            scales = self._scales(image_ids[some], geometry[some])
            starts = plane_starts(self.data.heights[image_ids[some]], self.data.widths[image_ids[some]], scales)
            planes = self._scratch(int(starts[-1]))
            layout = np.empty((len(scales), LAYOUT_COLUMNS), np.int32)
            self._decode(image_ids[some], scales, starts, planes, layout)
            out = slot.pixels.numpy()
            cubic = self.recipe.cubic
            resize_views(planes, starts, layout, geometry[some], self.sizes, self.starts, some.start, cubic, out)

        self._on_threads(decode_and_resize, len(image_ids))
        views = []
        for s, start, stop in zip(self.sets, self.set_starts, self.set_starts[1:], strict=False):
            pixels = slot.pixels[start:stop].view(self.batch_size, len(s.ids), 3, s.size, s.size)
            views.append(pixels[: len(image_ids)])
        return Batch(image_ids, tuple(views), self._colour(slot, len(image_ids)), slot, self.sets)

    def _on_threads(self, work: Callable[[slice], None], images: int) -> None:
        """Call ``work`` with slices of so many images, small enough that the last one keeps nobody waiting."""
        step = max(1, -(-images // (4 * self.threads)))
        for _ in self.pool.map(work, [slice(first, min(first + step, images)) for first in range(0, images, step)]):
            pass

    def _scales(self, image_ids: np.ndarray, geometry: np.ndarray) -> np.ndarray:
        """(n,) int64: how much smaller than stored each image is decoded; uncompressed ones always come whole."""
        return np.where(self.data.modes[image_ids] == RAW, 1, decode_scales(geometry, self.sizes))

    def _decode(
        self, image_ids: np.ndarray, scales: np.ndarray, starts: np.ndarray, planes: np.ndarray, layout: np.ndarray
    ) -> None:
        """``decode_planes`` on the calling thread; what libjpeg-turbo complains about is Pillow's to judge."""
        data = self.data
        data.check(image_ids)
        decode_planes(
            decoder_handle(), data.memory, data.pointers, data.sizes, data.modes, data.heights, data.widths,
            image_ids, scales, starts, planes, layout,
        )  # fmt: skip
        for i in np.flatnonzero(layout[:, KIND] == UNDECODED):
            image = Image.fromarray(data.image(int(image_ids[i]))).reduce(int(scales[i]))  # its room is for that size
            split_pixels(np.ascontiguousarray(image), planes[starts[i] : starts[i + 1]], layout[i])
            layout[i, SCALE] = scales[i]

    def _scratch(self, length: int) -> np.ndarray:
        """(at least length,) uint8 of this thread's own; it grows to the largest that was ever needed."""
        if getattr(self.thread, "scratch", np.empty(0)).size < length:
            self.thread.scratch = np.empty(length, np.uint8)
        return self.thread.scratch

    def _colour(self, slot: Slot, images: int) -> tuple[torch.Tensor, ...]:
        return slot.colour[:images].split([len(s.ids) for s in self.sets], dim=1)


class PlaneFetcher(ViewFetcher):
    """Image ids to a Batch of planes: the CPU's part where a GPU makes the views.

    An image's planes are 1.5 bytes a pixel at 4:2:0, and a quarter of that and less where they are decoded at a smaller
    scale; RGB padded to the largest image of the batch would be 3 and more, to copy and to read.
    """

    def _slot(self) -> Slot:
        return Slot(_bytes(0), self._colour_memory())

    def _fill(self, slot: Slot, image_ids: np.ndarray, geometry: np.ndarray) -> Batch:
        scales = self._scales(image_ids, geometry)
        starts = plane_starts(self.data.heights[image_ids], self.data.widths[image_ids], scales)
        length = int(starts[-1])
        if len(slot.pixels) < length:
            slot.pixels = _bytes(length + length // 4)  # page-locking is slow: seldom, then
        pixels, layout = slot.pixels.numpy(), np.empty((len(image_ids), LAYOUT_COLUMNS), np.int32)

        def decode(some: slice) -> None:
            self._decode(image_ids[some], scales[some], starts[some.start : some.stop + 1], pixels, layout[some])

        self._on_threads(decode, len(image_ids))
        described = [torch.from_numpy(array) for array in (starts, layout, geometry)]
        colour = slot.colour[: len(image_ids)]
        planes = Planes(slot.pixels[:length], *described, colour=colour, cubic=self.recipe.cubic)
        return Batch(image_ids, (), self._colour(slot, len(image_ids)), slot, self.sets, planes)


def _bytes(length: int) -> torch.Tensor:
    """(length,) uint8, to be copied to a GPU from if there is one."""
    return torch.empty(length, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
