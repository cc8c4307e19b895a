"""Images to views: one decode an image, all of its views, ahead of the consumer. The same for both stages.

Two back ends give the same views: ``ffcv_backend`` is the fast one, ``pillow_backend`` the plain one.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from ..errors import MisuseError
from ..images.beton import Beton
from . import pillow_backend
from .batch import Batch, ViewSet
from .recipes import Recipe

_threads = torch.get_num_threads()
try:
    from . import ffcv_backend
except ImportError:  # ffcv is not installed: the plain one still works
    ffcv_backend = None
finally:
    torch.set_num_threads(_threads)  # importing ffcv sets it to 1 for everybody

__all__ = ["Batch", "LoaderConfig", "ViewLoader", "ViewSet"]


@dataclass(frozen=True)
class LoaderConfig:
    """How views are loaded. ``backend`` is auto, ffcv, torch or gpu; ``workers`` threads (processes with torch), 0 =
    all cores. With gpu the workers only decode: batches carry planes, of which ``Batch.augment`` makes views on the device.
    """

    backend: str = "auto"
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "ffcv", "torch", "gpu"):
            raise MisuseError(f"`backend` is {self.backend!r}, expected auto, ffcv, torch or gpu")
        if self.backend in ("ffcv", "gpu") and ffcv_backend is None:
            raise MisuseError(
                f"`backend` {self.backend} needs the package ffcv, which is not installed: install it, or use `backend` torch"
            )
        if self.on_gpu and find_spec("triton") is None:
            raise MisuseError("`backend` gpu needs the package triton, which is not installed: use `backend` auto")
        if self.batch_size < 1 or self.workers < 0:
            raise MisuseError(
                f"`batch_size` must be at least 1 and `workers` at least 0, got {self.batch_size} and {self.workers}"
            )

    @property
    def geometry(self) -> str:
        """The resize path, as written into a store's manifest: ``planes``, ``planes-gpu`` or ``pillow``."""
        if self.backend == "torch" or ffcv_backend is None:
            return pillow_backend.GEOMETRY
        return ffcv_backend.GEOMETRY_ON_GPU if self.on_gpu else ffcv_backend.GEOMETRY

    @property
    def on_gpu(self) -> bool:
        """Whether batches carry planes, for ``Batch.augment`` to make views of on the GPU."""
        return self.backend == "gpu"

    def check_device(self, device: torch.device) -> None:
        """Raises MisuseError where views are to be made on a GPU and ``device`` is none."""
        if self.on_gpu and device.type != "cuda":
            raise MisuseError(
                f"`backend` gpu makes the views on a CUDA device, and this runs on {device}: use `backend` auto"
            )

    @property
    def threads(self) -> int:
        """``workers``, or the number of cores that this process may use."""
        if self.workers:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ViewLoader:
    """Iterates over the views of images in any order.

    Raises FailureError, naming the image, when one cannot be decoded.
    """

    def __init__(self, data: Beton, recipe: Recipe, seed: int, config: LoaderConfig) -> None:
        arguments = data, recipe, seed, config.batch_size, config.threads
        if ffcv_backend is None or config.backend == "torch":
            self._backend = pillow_backend.PillowBackend(*arguments)
        else:
            self._backend = ffcv_backend.FfcvBackend(*arguments, planes=config.on_gpu)

    def epoch(self, order: np.ndarray, sets: Sequence[ViewSet]) -> Iterator[Batch]:
        """Batches of the images ``order`` (int64 image ids) with the views of all ``sets``; the last batch may be
        short.

        One epoch at a time: a new one ends the one before it.
        """
        return self._backend.epoch(np.asarray(order, np.int64), sets)
