"""The fast loader: one JPEG decode an image, all of its views, in compiled code on a pool of threads, batches ahead.

ffcv's Loader runs it, with one operation of ours. Importing this module needs ffcv.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.memory_managers.os_cache import OSCacheManager
from ffcv.pipeline.compiler import Compiler
from numba import types

from .batch import Batch, Slot, ViewSet
from .beton import Beton
from .decode import KIND, UNDECODED, decode_planes, decode_scales, decoder_handle, plane_starts, split_pixels
from .render import render_views
from .views import Recipe, view_parameters

GEOMETRY = "planes"
"""Name of this resize path in a store's manifest."""

BATCHES_AHEAD = 3
"""Rendered batches that may wait for the consumer."""

_bytes = types.Array(types.uint8, 1, "C", readonly=True)
_memory_type = types.Tuple([_bytes, types.uint64[::1], types.uint64[::1]])


def _compile_reader(_manager: OSCacheManager) -> Any:
    """ffcv's own reader of a mapped file, typed without harm. ffcv makes the read-only type by writing to numba's one
    and only ``uint8[::1]``, which changes that type's hash while it is a key in the tables of all that is compiled
    already: the next compilation dies of a KeyError."""

    def read(address, memory):
        size = memory[2][np.searchsorted(memory[1], address)]
        return memory[0][address : address + size]

    return Compiler.compile(read, _bytes(types.uint64, _memory_type))


OSCacheManager.compile_reader = _compile_reader  # pyright: ignore[reportAttributeAccessIssue]


class FfcvPath:
    """ffcv's Loader, its traversal order and its thread, around a ``Renderer``."""

    def __init__(self, data: Beton, recipe: Recipe, seed: int, batch_size: int, threads: int) -> None:
        self.renderer = Renderer(data, recipe, seed, batch_size, threads)
        self.running = None
        # Our operation is compiled already, and cached on disk; ffcv would compile for seconds in every process.
        Compiler.set_enabled(False)
        pipelines: Any = {"image": [_RenderViews(self.renderer)], "label": None}
        try:
            self.loader: Any = Loader(
                str(data.path),
                batch_size=batch_size,
                num_workers=_torch_threads(),
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=BATCHES_AHEAD,
            )
        finally:
            Compiler.set_enabled(True)

    def epoch(self, order: np.ndarray, sets: Sequence[ViewSet]) -> Iterator[Batch]:
        self._stop()
        if not len(order):
            return
        self.renderer.set_views(sets)
        self.loader.traversal_order = _Order(order)
        self.loader.first_traversal_order = order  # what its length is taken from
        self.loader.num_workers = _torch_threads()
        self.running = running = iter(self.loader)
        try:
            for (result,) in running:
                if isinstance(result, BaseException):
                    raise result
                yield result
            if self.running is not running:
                raise RuntimeError("a newer epoch of this loader has ended this one")
        finally:
            if self.running is running:
                self._stop()

    def _stop(self) -> None:
        """End the running epoch, if any, and wait for its thread: the next one changes what that works with."""
        running, self.running = self.running, None
        if running is None:
            return
        running.iter_ixes = iter(())  # left alone it would render until its queue is full
        while running.is_alive():
            with suppress(queue.Empty):
                running.output_queue.get(timeout=0.05)
        while not running.output_queue.empty():  # a thread that was done already leaves it full
            running.output_queue.get_nowait()
        running.output_queue.put(None)  # whoever still iterates over it comes to an end
        running.close()


def _torch_threads() -> int:
    """The thread count to hand to ffcv. It renders on our threads, but sets torch's and numba's for everybody to its
    own number."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]


class _Order:
    """A traversal order for ffcv's Loader, which asks only this of one once it is built."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.order


class _RenderViews(SimpleRGBImageDecoder):
    """The ffcv operation. Its result is a Batch, or the exception that rendering raised."""

    def __init__(self, renderer: "Renderer") -> None:
        super().__init__()
        self.renderer = renderer

    def declare_state_and_memory(self, previous_state):
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("u1")), None

    def generate_code(self):
        def render(image_ids, _memory, _metadata, _storage):
            try:
                return self.renderer(np.asarray(image_ids, np.int64))
            except BaseException as error:  # ffcv's thread would die with it, and its consumer wait for ever
                return error

        return render


class Renderer:
    """Image ids to a Batch, on ``threads`` threads; the memory of a batch is used again BATCHES_AHEAD + 2 batches
    later."""

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
        slots = [
            self._slot() for _ in range(BATCHES_AHEAD + 2)
        ]  # those waiting, one being rendered, one at the consumer
        self.slots = cycle(slots)

    def _slot(self) -> Slot:
        pinned = torch.cuda.is_available()
        return Slot(
            torch.empty(int(self.set_starts[-1]), dtype=torch.uint8, pin_memory=pinned),
            torch.empty(self.batch_size, len(self.view_ids), 8),
        )

    def __call__(self, image_ids: np.ndarray) -> Batch:
        slot = next(self.slots)
        if slot.copied is not None:
            slot.copied.synchronize()
        heights, widths = self.data.heights[image_ids, None], self.data.widths[image_ids, None]
        drawn = view_parameters(self.recipe, self.seed, image_ids[:, None], self.view_ids, heights, widths)
        slot.colour[: len(image_ids)] = torch.from_numpy(drawn.colour)
        step = max(
            1, -(-len(image_ids) // (4 * self.threads))
        )  # slices small enough that the last one keeps nobody waiting

        def render(first: int) -> None:
            some = slice(first, first + step)
            self._render(image_ids[some], drawn.geometry[some], first, slot.pixels.numpy())

        for _ in self.pool.map(render, range(0, len(image_ids), step)):
            pass
        return self._batch(image_ids, slot)

    def _render(self, image_ids: np.ndarray, geometry: np.ndarray, first: int, out: np.ndarray) -> None:
        """The views of some images, on the calling thread. Raises FailureError when an image cannot be decoded."""
        data = self.data
        scales = decode_scales(geometry, self.sizes)
        starts = plane_starts(data.heights[image_ids], data.widths[image_ids], scales)
        planes = self._scratch(int(starts[-1]))
        layout = np.empty((len(image_ids), 6), np.int32)
        decode_planes(
            decoder_handle(), data.memory, data.pointers, data.sizes, data.modes, data.heights, data.widths,
            image_ids, scales, starts, planes, layout,
        )  # fmt: skip
        for i in np.flatnonzero(layout[:, KIND] == UNDECODED):
            pixels = data.image(int(image_ids[i]))
            split_pixels(pixels, planes[starts[i] :], layout[i])
        render_views(planes, starts, layout, geometry, self.sizes, self.starts, first, out)

    def _scratch(self, length: int) -> np.ndarray:
        """(at least length,) uint8 of this thread's own; it grows to the largest that was ever needed."""
        if getattr(self.thread, "scratch", np.empty(0)).size < length:
            self.thread.scratch = np.empty(length, np.uint8)
        return self.thread.scratch

    def _batch(self, image_ids: np.ndarray, slot: Slot) -> Batch:
        views, colour, first = [], [], 0
        for s, start, stop in zip(self.sets, self.set_starts, self.set_starts[1:], strict=False):
            pixels = slot.pixels[start:stop].view(self.batch_size, len(s.ids), 3, s.size, s.size)
            views.append(pixels[: len(image_ids)])
            colour.append(slot.colour[: len(image_ids), first : first + len(s.ids)])
            first += len(s.ids)
        return Batch(image_ids, tuple(views), tuple(colour), slot)
