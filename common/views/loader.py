"""Images to views: one decode an image, all of its views, ahead of the consumer. The same for both stages.

Two back ends give the same views: ``ffcv_backend`` is the fast one, ``pillow_backend`` the plain one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from ..device_settings import stored_settings
from ..errors import MisuseError
from ..images.beton import Beton
from . import pillow_backend
from .batch import Batch, ViewSet
from .config import LoaderConfig
from .recipes import Recipe

try:
    from . import ffcv_backend
except ImportError:  # ffcv is not installed: the plain one still works
    ffcv_backend = None

__all__ = ["Batch", "LoaderConfig", "ViewLoader", "ViewSet", "check_loader", "geometry", "resolve_loader"]


def resolve_loader(config: LoaderConfig, device: torch.device, as_in: str | None = None) -> LoaderConfig:
    """``config`` with what ``auto`` stands for on ``device``: gpu on CUDA where ffcv and Triton are, unless ``rob gpu-check``
    found the CPU's views to be faster on this GPU; ffcv or torch elsewhere.

    as_in: the geometry of views that the loader's are to be like, pixel by pixel: the same is taken where it can be.
    """
    if config.backend != "auto" or ffcv_backend is None:
        return config
    if as_in == pillow_backend.GEOMETRY:
        return replace(config, backend="torch")
    if device.type != "cuda" or find_spec("triton") is None or as_in == ffcv_backend.GEOMETRY:
        return replace(config, backend="ffcv")
    if as_in == ffcv_backend.GEOMETRY_ON_GPU or stored_settings(device).loader in (None, "gpu"):
        return replace(config, backend="gpu")
    return replace(config, backend="ffcv")


def geometry(config: LoaderConfig) -> str:
    """The resize path, as written into a store's manifest: ``planes``, ``planes-gpu`` or ``pillow``."""
    if config.backend == "torch" or ffcv_backend is None:
        return pillow_backend.GEOMETRY
    return ffcv_backend.GEOMETRY_ON_GPU if config.on_gpu else ffcv_backend.GEOMETRY


def check_loader(config: LoaderConfig, device: torch.device | None = None) -> None:
    """MisuseError: a package is missing, or views are to be made on a GPU and ``device``, where it is known, is none."""
    if config.backend in ("ffcv", "gpu") and ffcv_backend is None:
        raise MisuseError(
            f"`backend` {config.backend} needs the package ffcv, which is not installed: install it, or use `backend` torch"
        )
    if config.on_gpu and find_spec("triton") is None:
        raise MisuseError("`backend` gpu needs the package triton, which is not installed: use `backend` auto")
    if config.on_gpu and device is not None and device.type != "cuda":
        raise MisuseError(
            f"`backend` gpu makes the views on a CUDA device, and this runs on {device}: use `backend` auto"
        )


class ViewLoader:
    """Iterates over the views of images in any order.

    MisuseError as ``check_loader``. FailureError, naming the image, when one cannot be decoded.
    """

    def __init__(self, data: Beton, recipe: Recipe, seed: int, config: LoaderConfig) -> None:
        check_loader(config)
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
