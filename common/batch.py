"""What a loader is asked for and what it gives: sets of views, and batches of them."""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor


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
class Batch:
    """A batch of images' views.

    image_ids: (B,) int64. views: for each ViewSet (B, n, 3, size, size) uint8 RGB. colour: for each ViewSet (B, n, 8)
    float32, the parameters for ``augment``. The memory is reused: a batch is valid until the next one is asked for.
    """

    image_ids: np.ndarray
    views: tuple[Tensor, ...]
    colour: tuple[Tensor, ...]
    slot: Slot | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its views on ``device``; colour stays on the CPU, where ``augment`` wants it.

        To a GPU the copy runs beside the computation, on a stream of its own that the caller's stream waits for.
        """
        if device.type != "cuda" or self.slot is None:
            return replace(self, views=tuple(views.to(device) for views in self.views))
        copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copying):
            views = tuple(views.to(device, non_blocking=True) for views in self.views)
            self.slot.copied = copying.record_event()
        computing.wait_stream(copying)
        for tensor in views:
            tensor.record_stream(computing)
        return replace(self, views=views)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
