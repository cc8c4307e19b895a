"""What a loader is asked for and what it gives: sets of views, and batches of them."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .colours import apply_colours
from .planes import Planes


@dataclass(frozen=True)
class ViewSet:
    """Some views of every image, by view id, all made at the same ``size`` in pixels. Global and local ids may be
    mixed."""

    ids: tuple[int, ...]
    size: int


@dataclass
class Slot:
    """Memory that batches are made in, one after the other; page-locked where there is a GPU to copy it to."""

    pixels: Tensor
    """(bytes,) uint8: for each ViewSet (batch size, n, 3, size, size), one behind another; or the images' planes."""
    colour: Tensor
    """(batch size, all views, 8) float32."""
    copied: torch.Event | None = None
    """Recorded behind the last copy out of the slot: nothing may be written before that is done."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of images' views: cropped and resized, or the planes that a GPU makes them from.

    image_ids: (B,) int64. views: for each ViewSet (B, n, 3, size, size) uint8 RGB; empty where there are ``planes``.
    colour: for each ViewSet (B, n, 8) float32 on the CPU, the parameters for ``apply_colours``. The memory is reused: a batch is
    valid until the next one is asked for.
    """

    image_ids: np.ndarray
    views: tuple[Tensor, ...]
    colour: tuple[Tensor, ...]
    slot: Slot | None = None
    sets: tuple[ViewSet, ...] = ()
    planes: Planes | None = None

    @property
    def device(self) -> torch.device:
        """Where its views or planes are."""
        return self.views[0].device if self.planes is None else self.planes.pixels.device

    def to(self, device: torch.device) -> "Batch":
        """The batch with its views or planes on ``device``; colour stays on the CPU, where ``apply_colours`` wants it.

        To a GPU the copy runs beside the computation, on a stream of its own that the caller's stream waits for. What is there
        already is left as it is.
        """
        if self.device == device:
            return self
        if device.type != "cuda" or self.slot is None:
            return self._moved(device)
        copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copying):
            moved = self._moved(device)
            self.slot.copied = copying.record_event()
        computing.wait_stream(copying)
        for tensor in moved.views if moved.planes is None else moved.planes.tensors():
            tensor.record_stream(computing)
        return moved

    def _moved(self, device: torch.device) -> "Batch":
        if self.planes is not None:
            return replace(self, planes=self.planes.to(device))
        return replace(self, views=tuple(views.to(device, non_blocking=True) for views in self.views))

    def augment(
        self, number: int, blur_scale: float, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The views of the set ``number`` as a network takes them: (B, n, 3, size, size) of ``dtype``, on mean's device.

        mean, std: (3,) float32, blur_scale: as for ``apply_colours``, which this is where the loader has resized the views.
        """
        with torch.cuda.device_of(mean):  # Triton launches on the current GPU, which may be another
            return self._augmented(number, blur_scale, mean, std, dtype)

    def _augmented(self, number: int, blur_scale: float, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
        colour = self.colour[number]
        if self.planes is None:
            views = self.views[number].to(mean.device).flatten(0, 1)
            images = apply_colours(views, colour.flatten(0, 1), blur_scale, mean, std, dtype)
            return images.unflatten(0, colour.shape[:2])
        if mean.device.type == "cuda":
            from .kernel import views_from_planes
        else:
            from .reference import views_from_planes
        planes = self.planes if self.device == mean.device else self.planes.to(mean.device)
        first = sum(len(s.ids) for s in self.sets[:number])
        return views_from_planes(planes, first, self.sets[number].size, colour, blur_scale, mean, std, dtype)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
