"""The last rows of many steps: MoCo's negatives (1911.05722, algorithm 1), SwAV's further rows to balance (2006.09882, 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.ranks import joined

SMALLEST_SHARE = 8
"""A default queue has at most one row for every so many images: a row must have left before its image comes again."""


def queue_length(asked: int | None, usual: int, num_images: int | None) -> int:
    """Rows of a queue: what is ``asked``, or the paper's ``usual`` length, less for a data set of few images.

    MisuseError: more rows than images, so that an image would meet what its own teacher said among the others'.
    """
    if num_images is None:
        return asked or usual
    if asked is not None and asked > num_images:
        raise MisuseError(
            f"`queue` {asked} is longer than the data set of {num_images} images, which would meet themselves in it: "
            f"take at most {max(1, num_images // SMALLEST_SHARE)}"
        )
    return asked or max(1, min(usual, num_images // SMALLEST_SHARE))


class Queue(nn.Module):
    """A ring of ``length`` rows of ``width``, part of the checkpoint. Every rank has all of it.

    It starts with random unit rows, as MoCo's does; ``full`` tells when they are gone.
    """

    rows: Tensor
    """(length, width) float32, in no particular order."""
    pushed: int
    """Rows pushed since the start."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(length, width), dim=1))
        self.pushed = 0

    @property
    def full(self) -> bool:
        return self.pushed >= len(self.rows)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """The newest rows of this step, (..., width) on each rank, in the oldest ones' place."""
        newest = joined(rows.flatten(0, -2))
        self.pushed += len(newest)
        newest = newest[-len(self.rows) :]
        places = torch.arange(self.pushed - len(newest), self.pushed, device=self.rows.device) % len(self.rows)
        # Out of place: this step's backward pass may still read the rows as they were.
        self.rows = self.rows.index_copy(0, places, newest.to(self.rows.dtype))

    def get_extra_state(self) -> int:
        return self.pushed

    def set_extra_state(self, state: int) -> None:
        self.pushed = state
