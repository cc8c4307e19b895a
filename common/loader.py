"""Images to views: one decode an image, all of its views in one buffer, ahead of the consumer.

Two paths give the same views. ``ffcv`` (the fast one) runs ffcv's Loader with one operation of ours, which renders in compiled code
on a pool of threads. ``torch`` is Pillow in a torch DataLoader, simple code: it is the tests' truth for the geometry, and it runs
where ffcv cannot be built.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .beton import Beton
from .errors import FailureError, MisuseError
from .views import Recipe, view_parameters

try:
    from . import render
except ImportError:  # ffcv is not installed: the torch path still works
    render = None


@dataclass(frozen=True)
class ViewSet:
    """Some views of every image, all rendered at the same size in pixels. Any of the ids in ``views`` may be in it."""

    ids: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Batch:
    """A batch of images' views.

    image_ids: (B,) int64. views: for each ViewSet (B, n, 3, size, size) uint8 RGB. colour: for each ViewSet (B, n, 8) float32, the
    parameters for ``augment``. The arrays are reused: a batch is valid until the next one is asked for.
    """

    image_ids: np.ndarray
    views: tuple[Tensor, ...]
    colour: tuple[Tensor, ...]


@dataclass(frozen=True)
class LoaderConfig:
    """How views are loaded. ``path`` is auto, ffcv or torch; ``workers`` threads (ffcv) or processes (torch), 0 = all cores."""

    path: str = "auto"
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        if self.path not in ("auto", "ffcv", "torch"):
            raise MisuseError(f"--loader is {self.path!r}, expected auto, ffcv or torch")
        if self.path == "ffcv" and render is None:
            raise MisuseError("--loader ffcv needs the package ffcv, which is not installed: install it, or use --loader torch")
        if self.batch_size < 1 or self.workers < 0:
            raise MisuseError(f"--batch-size must be at least 1 and --workers at least 0, got {self.batch_size} and {self.workers}")

    @property
    def geometry(self) -> str:
        """The resize path, as written into a store's manifest: ``planes`` or ``pillow``."""
        return "pillow" if self.path == "torch" or render is None else render.GEOMETRY

    @property
    def threads(self) -> int:
        return self.workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class ViewLoader:
    """Iterates over the views of images in any order; the same for both stages.

    Raises FailureError, naming the image, when one cannot be decoded.
    """

    def __init__(self, data: Beton, recipe: Recipe, seed: int, config: LoaderConfig) -> None:
        self.data, self.recipe, self.seed, self.config = data, recipe, seed, config
        self._ffcv = None if config.geometry == "pillow" else _FfcvPath(data, recipe, seed, config)

    def epoch(self, order: np.ndarray, sets: Sequence[ViewSet]) -> Iterator[Batch]:
        """Batches of the images ``order`` (int64 image ids) with the views of all ``sets``; the last batch may be short."""
        if self._ffcv is not None:
            return self._ffcv.epoch(order, sets)
        return _torch_epoch(self.data, self.recipe, self.seed, self.config, order, sets)


class _FfcvPath:
    def __init__(self, data: Beton, recipe: Recipe, seed: int, config: LoaderConfig) -> None:
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline.compiler import Compiler
        from numba import config as numba_config

        self.data = data
        self.decoder = _view_decoder(data, recipe, seed, config.threads)
        # Our operation is compiled already, and cached on disk; ffcv would compile for seconds in every process. It also sets
        # torch's thread count to its own number of workers, for everybody: hand it torch's, and put back what numba refuses.
        threads = torch.get_num_threads()
        Compiler.set_enabled(False)
        try:
            self.loader = Loader(
                str(data.path),
                batch_size=config.batch_size,
                num_workers=min(threads, numba_config.NUMBA_NUM_THREADS),
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                pipelines={"image": [self.decoder], "label": None},
                drop_last=False,
                batches_ahead=3,
            )
        finally:
            Compiler.set_enabled(True)
            torch.set_num_threads(threads)

    def epoch(self, order: np.ndarray, sets: Sequence[ViewSet]) -> Iterator[Batch]:
        if not len(order):
            return
        self.decoder.set_views(sets)
        self.loader.traversal_order = _Order(order)
        self.loader.first_traversal_order = order  # what its length is taken from
        batches = iter(self.loader)
        try:
            for (result,) in batches:
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            batches.close()


class _Order:
    """A traversal order for ffcv's Loader, which only asks this of it once it is built."""

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.order


def _view_decoder(data: Beton, recipe: Recipe, seed: int, threads: int):
    """The ffcv operation that renders all views of a batch (a function, so that ffcv is imported only where it is used)."""
    from dataclasses import replace

    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery

    assert render is not None

    class ViewDecoder(SimpleRGBImageDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
            self.set_views(())

        def set_views(self, sets: Sequence[ViewSet]) -> None:
            self.sets = tuple(sets)
            self.ids = np.array([i for s in sets for i in s.ids], np.int64)
            self.sizes = np.array([s.size for s in sets for _ in s.ids], np.int64)
            self.offsets = np.concatenate([[0], np.cumsum(3 * self.sizes**2)]).astype(np.int64)

        def declare_state_and_memory(self, previous_state):
            shape = (int(self.offsets[-1]),)
            state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
            return state, (
                AllocationQuery(shape, np.dtype("u1")),
                AllocationQuery((len(self.ids), 8), np.dtype("f4")),
            )

        def generate_code(self):
            return self.decode

        def decode(self, image_ids, buffers, metadata, storage):
            try:
                return self.render(np.asarray(image_ids, np.int64), *buffers)
            except BaseException as error:  # ffcv's thread would die with it, and its consumer wait for ever
                return error

        def render(self, image_ids: np.ndarray, out: np.ndarray, colour: np.ndarray) -> Batch:
            table, kinds = recipe.table(), len(recipe.global_crops)
            step = max(1, -(-len(image_ids) // (4 * threads)))

            def some(start: int) -> int:
                part = slice(start, start + step)
                return render.render_views(
                    render.decoder_handle(), data.memory, data.pointers, data.sizes, data.modes, data.heights, data.widths,
                    image_ids[part], table, kinds, seed, self.ids, self.sizes, self.offsets, out[part], colour[part],
                )  # fmt: skip

            for bad in self.pool.map(some, range(0, len(image_ids), step)):
                if bad >= 0:
                    raise FailureError(f"{data.path}: image {bad} ({data.manifest.paths[bad]}) cannot be decoded: pack the data again")
            views, colours, first = [], [], 0
            flat, colour_tensor = torch.from_numpy(out), torch.from_numpy(colour)
            for s in self.sets:
                last = first + len(s.ids)
                part = flat[:, self.offsets[first] : self.offsets[last]]
                views.append(part.view(len(image_ids), len(s.ids), 3, s.size, s.size).transpose(-1, -2))
                colours.append(colour_tensor[:, first:last])
                first = last
            return Batch(image_ids, tuple(views), tuple(colours))

    return ViewDecoder()


@dataclass(frozen=True)
class _PillowViews(Dataset):
    """One image's views through Pillow: crop, antialiased bilinear resize, flip."""

    data: Beton
    recipe: Recipe
    seed: int
    sets: tuple[ViewSet, ...]

    def __getitem__(self, image_id: int) -> tuple[int, list[Tensor], list[Tensor]]:
        try:
            image = Image.fromarray(self.data.image(image_id))
        except (OSError, ValueError, SyntaxError) as error:
            path = self.data.manifest.paths[image_id]
            raise FailureError(f"{self.data.path}: image {image_id} ({path}) cannot be decoded ({error}): pack the data again") from None
        views, colours = [], []
        for s in self.sets:
            n = len(s.ids)
            ids, heights, widths = np.full(n, image_id), np.full(n, image.height), np.full(n, image.width)
            geometry, colour = view_parameters(self.recipe, self.seed, ids, np.array(s.ids), heights, widths)
            crops = np.empty((n, s.size, s.size, 3), np.uint8)
            for v, (top, left, height, width, flip) in enumerate(geometry.tolist()):
                crop = image.crop((left, top, left + width, top + height)).resize((s.size, s.size), Image.Resampling.BILINEAR)
                crops[v] = np.asarray(crop)[:, ::-1] if flip else np.asarray(crop)
            views.append(torch.from_numpy(crops).permute(0, 3, 1, 2))
            colours.append(torch.from_numpy(colour))
        return image_id, views, colours


def _collate(items: list) -> Batch:
    ids, views, colours = zip(*items, strict=True)
    stack = lambda parts: tuple(torch.stack(p) for p in zip(*parts, strict=True))  # noqa: E731
    return Batch(np.array(ids, np.int64), stack(views), stack(colours))


def _torch_epoch(data: Beton, recipe: Recipe, seed: int, config: LoaderConfig, order: np.ndarray, sets: Sequence[ViewSet]):
    ids = order.tolist()
    batches = [ids[i : i + config.batch_size] for i in range(0, len(ids), config.batch_size)]
    dataset = _PillowViews(data, recipe, seed, tuple(sets))
    workers = min(config.threads, len(batches)) if config.threads > 1 else 0
    yield from DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=partial(_collate))
