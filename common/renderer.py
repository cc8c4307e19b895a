"""Image ids to batches in compiled code on threads: views rendered on the CPU, or planes for a GPU to render from."""

import threading
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch

from .batch import Batch, Planes, Slot, ViewSet
from .beton import Beton
from .decode import KIND, UNDECODED, decode_planes, decode_scales, decoder_handle, plane_starts, split_pixels
from .render import render_views
from .views import Recipe, ViewParameters, view_parameters
from .workers import Workers

_splitting = threading.Lock()


class Renderer:
    """Image ids to a Batch of rendered views. ``slots`` batches are valid at a time; then their memory is used again.

    Raises FailureError when an image cannot be decoded.
    """

    def __init__(self, data: Beton, recipe: Recipe, seed: int, batch_size: int, threads: int, slots: int) -> None:
        self.data, self.recipe, self.seed, self.batch_size, self.num_slots = data, recipe, seed, batch_size, slots
        self.workers = Workers(threads, type(self).__name__)
        self.thread = threading.local()
        self.sets: tuple[ViewSet, ...] = ()

    def set_views(self, sets: Sequence[ViewSet]) -> None:
        """Choose the views of the batches to come."""
        if tuple(sets) == self.sets:
            return
        self.sets = tuple(sets)
        self.view_ids = np.array([i for s in sets for i in s.ids], np.int64)
        self.sizes = np.array([s.size for s in sets for _ in s.ids], np.int64)
        self.set_ends = np.cumsum([len(s.ids) for s in sets])
        # Of each view, where the first image's begins and how many bytes further the next image's.
        self.starts, self.set_starts, start = np.empty((len(self.view_ids), 2), np.int64), [], 0
        for s, end in zip(sets, self.set_ends, strict=True):
            view_bytes = 3 * s.size**2
            rows = self.starts[end - len(s.ids) : end]
            rows[:, 0], rows[:, 1] = start + view_bytes * np.arange(len(s.ids)), view_bytes * len(s.ids)
            self.set_starts.append(start)
            start += self.batch_size * view_bytes * len(s.ids)
        self.batch_bytes = start
        self.slots = cycle([self._slot() for _ in range(self.num_slots)])

    def __call__(self, image_ids: np.ndarray) -> Batch:
        slot = next(self.slots)
        if slot.copied is not None:
            slot.copied.synchronize()
        heights, widths = self.data.heights[image_ids, None], self.data.widths[image_ids, None]
        drawn = view_parameters(self.recipe, self.seed, image_ids[:, None], self.view_ids, heights, widths)
        slot.colour[: len(image_ids)] = torch.from_numpy(drawn.colour)
        return self._fill(slot, image_ids, drawn)

    def _slot(self) -> Slot:
        return Slot(_bytes(self.batch_bytes), torch.empty(self.batch_size, len(self.view_ids), 8))

    def _fill(self, slot: Slot, image_ids: np.ndarray, drawn: ViewParameters) -> Batch:
        out, slices = slot.pixels.numpy(), self.workers.slices(len(image_ids))

        def render(first: int) -> None:
            some = slice(first, first + slices.step)
            ids, geometry = image_ids[some], drawn.geometry[some]
            scales = decode_scales(geometry, self.sizes)
            starts = plane_starts(self.data.heights[ids], self.data.widths[ids], scales)
            planes, layout = self._scratch(int(starts[-1])), np.empty((len(ids), 6), np.int32)
            self._decode(ids, scales, starts, planes, layout)
            render_views(planes, starts, layout, geometry, self.sizes, self.starts, first, out)

        self.workers.run(render, slices)
        views = []
        for s, start in zip(self.sets, self.set_starts, strict=True):
            shape = len(image_ids), len(s.ids), 3, s.size, s.size
            views.append(slot.pixels[start : start + int(np.prod(shape))].view(shape))
        return Batch(image_ids, self.sets, self._colour(slot, len(image_ids)), tuple(views), slot=slot)

    def _decode(
        self, image_ids: np.ndarray, scales: np.ndarray, starts: np.ndarray, planes: np.ndarray, layout: np.ndarray
    ):
        """``decode_planes`` on the calling thread; Pillow has the last word on what libjpeg-turbo complains about."""
        data = self.data
        decode_planes(
            decoder_handle(), data.memory, data.pointers, data.sizes, data.modes, data.heights, data.widths,
            image_ids, scales, starts, planes, layout,
        )  # fmt: skip
        for i in np.flatnonzero(layout[:, KIND] == UNDECODED):
            pixels = data.image(int(image_ids[i]))
            with _splitting:  # rare, and its first call compiles
                split_pixels(pixels, planes[starts[i] : starts[i + 1]], layout[i])

    def _colour(self, slot: Slot, images: int) -> tuple[torch.Tensor, ...]:
        ends = zip(self.sets, self.set_ends, strict=True)
        return tuple(slot.colour[:images, end - len(s.ids) : end] for s, end in ends)

    def _scratch(self, length: int) -> np.ndarray:
        """(at least length,) uint8 of this thread's own; it grows to the largest that was ever needed."""
        if getattr(self.thread, "scratch", np.empty(0)).size < length:
            self.thread.scratch = np.empty(length, np.uint8)
        return self.thread.scratch


class PlaneReader(Renderer):
    """Image ids to a Batch of planes: the CPU's part where a GPU renders the views."""

    def _slot(self) -> Slot:
        return Slot(_bytes(0), torch.empty(self.batch_size, len(self.view_ids), 8))

    def _fill(self, slot: Slot, image_ids: np.ndarray, drawn: ViewParameters) -> Batch:
        scales = decode_scales(drawn.geometry, self.sizes)
        starts = plane_starts(self.data.heights[image_ids], self.data.widths[image_ids], scales)
        length = int(starts[-1])
        if len(slot.pixels) < length:
            slot.pixels = _bytes(length + length // 4)
        pixels, layout = slot.pixels.numpy(), np.empty((len(image_ids), 6), np.int32)
        slices = self.workers.slices(len(image_ids))

        def decode(first: int) -> None:
            some = slice(first, first + slices.step)
            self._decode(image_ids[some], scales[some], starts[first : first + slices.step + 1], pixels, layout[some])

        self.workers.run(decode, slices)
        planes = Planes(slot.pixels[:length], *map(torch.from_numpy, (starts, layout, drawn.geometry)))
        return Batch(image_ids, self.sets, self._colour(slot, len(image_ids)), planes=planes, slot=slot)


def _bytes(length: int) -> torch.Tensor:
    """Memory to copy to a GPU from, if there is one."""
    return torch.empty(length, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
