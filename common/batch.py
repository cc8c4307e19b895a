"""What a loader is asked for and what it gives: sets of views, and batches of them."""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .augment import augment


@dataclass(frozen=True)
class ViewSet:
    """Some views of every image, by view id, all rendered at the same ``size`` in pixels. Global and local ids may be
    mixed."""

    ids: tuple[int, ...]
    size: int


@dataclass
class Slot:
    """Memory that batches are rendered into in turn, page-locked where there is a GPU to copy it to."""

    pixels: Tensor
    """(bytes,) uint8: for each ViewSet (batch size, n, 3, size, size), one behind another."""
    colour: Tensor
    """(batch size, all views, 8) float32."""
    copied: torch.Event | None = None
    """Recorded behind the last copy out of the slot: nothing may be written before that is done."""


@dataclass(frozen=True, eq=False)
class Planes:
    """A batch's decoded images and where the views are in them, for ``view_kernel`` to make the views on a GPU."""

    pixels: Tensor
    """(bytes,) uint8, of ``decode_planes``."""
    starts: Tensor
    """(B + 1,) int64: where each image's planes begin, and the end."""
    layout: Tensor
    """(B, 6) int32, of ``decode_planes``."""
    geometry: Tensor
    """(B, all views, 5) int32, of ``ViewParameters``."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of images' views: rendered ones, or planes to render them from.

    image_ids: (B,) int64. sets: what was asked for. colour: for each ViewSet (B, n, 8) float32, the parameters for
    ``augment``. views: for each ViewSet (B, n, 3, size, size) uint8 RGB, none where there are planes. The memory is reused:
    a batch is valid until the next one is asked for.
    """

    image_ids: np.ndarray
    sets: tuple[ViewSet, ...]
    colour: tuple[Tensor, ...]
    views: tuple[Tensor, ...] = ()
    planes: Planes | None = None
    slot: Slot | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its pixels on ``device``; colour stays on the CPU, where ``augment`` wants it.

        To a GPU the copy runs beside the computation, on a stream of its own that the caller's stream waits for.
        """
        planes = self.planes
        tensors = self.views if planes is None else (planes.pixels, planes.starts, planes.layout, planes.geometry)
        if device.type != "cuda" or self.slot is None:
            tensors = tuple(tensor.to(device) for tensor in tensors)
        else:
            copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
            with torch.cuda.stream(copying):
                tensors = tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
                self.slot.copied = copying.record_event()
            computing.wait_stream(copying)
            for tensor in tensors:
                tensor.record_stream(computing)
        return replace(self, views=tensors) if planes is None else replace(self, planes=Planes(*tensors))

    def images(self, number: int, blur_scale: float, mean: Tensor, std: Tensor) -> Tensor:
        """The views of ``sets[number]`` as the network takes them: (B * n, 3, size, size) float32, where the pixels are.

        blur_scale, mean, std: as ``augment`` takes them.
        """
        colour = self.colour[number]
        if self.planes is None:
            return augment(self.views[number].flatten(0, 1), colour.flatten(0, 1), blur_scale, mean, std)
        from .view_kernel import render_views  # needs triton

        first = sum(len(s.ids) for s in self.sets[:number])
        views, size = slice(first, first + colour.shape[1]), self.sets[number].size
        return render_views(self.planes, views, colour, size, blur_scale, mean, std)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
