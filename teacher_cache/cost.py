"""What caching will cost: bytes on the disk, and seconds at the speed of a trial batch."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from ..common.errors import MisuseError
from ..common.views.drawing import UNCHANGED
from ..common.views.loader import Batch

TRIAL_VIEWS = 32
"""In the batch whose time is taken, at most."""
TRIALS, TRIAL_SECONDS = 5, 4.0
"""One alone was seen to promise a quarter of the speed."""


@dataclass(frozen=True)
class CachePlan:
    """What caching will cost: bytes before compression, and seconds at the speed of a trial batch.

    ``bytes_per_view`` are all of the store, ``patch_bytes_per_view`` those among them of patch targets;
    ``temporary_bytes_per_view`` are of the embeddings that lie beside the store until prototypes are fitted to them.
    """

    num_images: int
    views: int
    bytes_per_view: int
    temporary_bytes_per_view: int
    patch_bytes_per_view: int
    free_bytes: int
    rows_done: int
    views_per_second: float

    @property
    def total_bytes(self) -> int:
        return self.num_images * self.views * (self.bytes_per_view + self.temporary_bytes_per_view)

    @property
    def seconds(self) -> float:
        """Of the rows still to do."""
        return (self.num_images - self.rows_done) * self.views / self.views_per_second


def refuse_what_will_not_fit(out: Path, bytes_when_done: Mapping[Path, int]) -> None:
    """MisuseError unless the disk has room for what is missing of these stores: ``out``, and one beside it while it is made."""
    needed = 0
    for path, size in bytes_when_done.items():
        done = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.exists() else 0
        needed += max(0, size - done)
    free = free_bytes(out)
    if needed > free:
        sizes = decimal(needed), decimal(free)
        if sizes[0] == sizes[1]:
            sizes = f"{needed:,} bytes", f"{free:,} bytes"
        beside = ", with the embeddings beside it until it is done," if len(bytes_when_done) > 1 else ""
        raise MisuseError(
            f"{out}{beside} needs {sizes[0]} and {sizes[1]} are free there: "
            "take fewer `views`, a smaller `encoding` (topk, or embedding in int8) or `patch_grid`, or another disk"
        )


def free_bytes(path: Path) -> int:
    """Of the disk that ``path`` is to lie on."""
    return shutil.disk_usage(path).free if path.exists() else free_bytes(path.absolute().parent)


def views_per_second(embed: Callable[[Batch], Tensor], batch_size: int, views: int, view_size: int) -> float:
    """Times the teacher alone on a small batch of noise: the fastest of a few, the first of which warms up."""
    images = min(batch_size, max(1, TRIAL_VIEWS // views))
    noise = torch.randint(0, 256, (images, views, 3, view_size, view_size), dtype=torch.uint8)
    plain = torch.tensor(UNCHANGED).expand(images, views, len(UNCHANGED))
    batch = Batch(np.arange(images), (noise,), (plain,))
    fastest, began = float("inf"), time.perf_counter()
    for number in range(TRIALS):
        start = time.perf_counter()
        embed(batch).cpu()
        if number:
            fastest = min(fastest, time.perf_counter() - start)
        if number and time.perf_counter() - began > TRIAL_SECONDS:
            break
    return images * views / fastest
