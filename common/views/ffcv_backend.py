"""The fast loader: one JPEG decode an image, all of its views, in compiled code on a pool of threads, batches ahead.

ffcv's Loader runs it, with one operation of ours. Importing this module needs ffcv.
"""

import queue
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from ..images.beton import Beton
from ..run import current_device, use_device
from .batch import Batch, ViewSet
from .fetcher import BATCHES_AHEAD, PlaneFetcher, ViewFetcher
from .ffcv_import import Compiler, Loader, OrderOption, OSCacheContext, OSCacheManager, SimpleRGBImageDecoder
from .recipes import Recipe

GEOMETRY, GEOMETRY_ON_GPU = "planes", "planes-gpu"
"""Names of these ways to resize in a store's manifest."""

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


def _open_manager(manager: OSCacheManager, reader: Any) -> None:
    """Without ffcv's tables of pages, Python's sets and dictionaries of all images: its own random order alone reads them, and
    for a million images they take seconds, for every loader."""
    table = reader.alloc_table
    order = np.argsort(table["ptr"])
    manager.reader, manager.ptrs, manager.sizes = reader, table["ptr"][order], table["size"][order]
    manager.context = OSCacheContext(manager)


OSCacheManager.__init__ = _open_manager  # pyright: ignore[reportAttributeAccessIssue]
OSCacheManager.compile_reader = _compile_reader  # pyright: ignore[reportAttributeAccessIssue]


class FfcvBackend:
    """ffcv's Loader, its traversal order and its thread, around a ``ViewFetcher``, or a ``PlaneFetcher`` for a GPU."""

    def __init__(
        self, data: Beton, recipe: Recipe, seed: int, batch_size: int, threads: int, planes: bool = False
    ) -> None:
        self.fetcher = (PlaneFetcher if planes else ViewFetcher)(data, recipe, seed, batch_size, threads)
        self.running = None
        # Our operation is compiled already, and cached on disk; ffcv would compile for seconds in every process.
        Compiler.set_enabled(False)
        pipelines: Any = {"image": [_Fetch(self.fetcher)], "label": None}
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
        self.fetcher.set_views(sets)
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
        running.iter_ixes = iter(())  # left alone it would make batches until its queue is full
        while running.is_alive():
            with suppress(queue.Empty):
                running.output_queue.get(timeout=0.05)
        while not running.output_queue.empty():  # a thread that was done already leaves it full
            running.output_queue.get_nowait()
        running.output_queue.put(None)  # whoever still iterates over it comes to an end
        running.close()


def _torch_threads() -> int:
    """The thread count to hand to ffcv. Batches are made on our threads, but sets torch's and numba's for everybody to its
    own number."""
    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]


class _Order:
    """A traversal order for ffcv's Loader, which asks only this of one once it is built."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.order


class _Fetch(SimpleRGBImageDecoder):
    """The ffcv operation. Its result is a Batch, or the exception that making it raised."""

    def __init__(self, fetcher: ViewFetcher) -> None:
        super().__init__()
        self.fetcher, self.device = fetcher, current_device()

    def declare_state_and_memory(self, previous_state):  # pyright: ignore[reportIncompatibleMethodOverride] (no memory)
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("u1")), None

    def generate_code(self):
        def fetch(image_ids, _memory, _metadata, _storage):
            try:
                use_device(self.device)  # of ffcv's thread, which page-locks memory and waits for copies
                return self.fetcher(np.asarray(image_ids, np.int64))
            except BaseException as error:  # ffcv's thread would die with it, and its consumer wait for ever
                return error

        return fetch
