"""What caching will cost: bytes on the disk, and seconds at the speed of a few trial batches."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from rich.filesize import decimal
from torch import Tensor

from ..common.errors import MisuseError
from ..common.places import is_address
from ..common.store.encodings import Encoding
from ..common.views.loader import Batch, ViewLoader, ViewSet

TRIAL_VIEWS = 32
"""In a batch whose time is taken, about."""
TRIALS, TRIAL_SECONDS = 5, 4.0
"""One batch alone was seen to promise a quarter of the speed; the teacher without the loader 1.4 times of it."""
MUCH = 10**9
"""Bytes of a store, above which it is said how it could be smaller."""
ENOUGH_VIEWS = 4
"""Students of 1 to 16 views were not told apart after nine passes over the images, nor from the live teacher's; from 4 on
they were within .6 points of it (benchmarks/claims.py, rows views)."""


@dataclass(frozen=True)
class CachePlan:
    """What caching will cost: bytes before compression, and seconds at the speed of a few trial batches.

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
    rows_to_do: int
    """Of the worker that has most of them, or of this one, which makes its part alone."""
    views_done: int = 0
    """Of each image, in a store that is given more."""
    batch_size: int = 1
    """That the last batch, too, is filled up to, with images that are thrown away."""
    smaller: Encoding | None = None
    """Of targets, than the one asked for; ``spared_bytes_per_view`` before compression."""
    spared_bytes_per_view: int = 0

    @property
    def total_bytes(self) -> int:
        return self.num_images * self.views * (self.bytes_per_view + self.temporary_bytes_per_view)

    @property
    def seconds(self) -> float:
        """Until the last worker is done, if all begin now."""
        rows = ceil(self.rows_to_do / self.batch_size) * self.batch_size
        return rows * (self.views - self.views_done) / self.views_per_second

    def advice(self) -> list[str]:
        """What would cost less and was measured to teach as much."""
        found = []
        if self.views > ENOUGH_VIEWS and not self.views_done:
            spared = self.seconds * (1 - ENOUGH_VIEWS / self.views)
            found.append(
                f"in nine passes over the images {ENOUGH_VIEWS} views taught students as well as 16 and as the live teacher: "
                f"`views` {ENOUGH_VIEWS} takes {spared:,.0f} s less"
            )
        if self.smaller is not None and self.total_bytes > MUCH and not self.rows_done and not self.views_done:
            spared = self.num_images * self.views * self.spared_bytes_per_view
            found.append(
                f"`store_dtype` {self.smaller.dtype} taught students as well in 234 steps: it takes {decimal(spared)} less"
            )
        return found


def refuse_what_will_not_fit(out: Path, bytes_when_done: Mapping[Path, int]) -> None:
    """MisuseError unless the disk has room for what is missing of these stores: ``out``, and one beside it while it is made."""
    if is_address(out):
        return  # buckets have no end
    needed = 0
    for path, size in bytes_when_done.items():
        needed += max(0, size - _bytes_under(path))
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


def _bytes_under(path: Path) -> int:
    """Of what is there, some of which other workers may take away meanwhile."""
    found = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            found += file.stat().st_size if file.is_file() else 0
    return found


def free_bytes(path: Path) -> int:
    """Of the disk that ``path`` is to lie on; 0 of a bucket, which has none."""
    if is_address(path):
        return 0
    return shutil.disk_usage(path).free if path.exists() else free_bytes(path.absolute().parent)


def views_per_second(
    embed: Callable[[Batch], Tensor], loader: ViewLoader, batch_size: int, views: ViewSet, num_images: int
) -> float:
    """Tries the teacher on the first few images of ``loader``, whose batches are of ``batch_size`` and made beside it, as they
    will be: on a CPU they share the cores. A first batch warms both up.
    """
    for _ in _embedded(embed, loader, views, min(batch_size, num_images)):
        pass
    seen, began = 0, time.perf_counter()
    for images in _embedded(embed, loader, views, min(TRIALS * batch_size, num_images)):
        seen += images
        if time.perf_counter() - began > TRIAL_SECONDS:
            break
    return seen * len(views.ids) / (time.perf_counter() - began)


def _embedded(embed: Callable[[Batch], Tensor], loader: ViewLoader, views: ViewSet, images: int) -> Iterator[int]:
    for batch in loader.epoch(np.arange(images), [views]):
        embed(batch).cpu()
        yield len(batch.image_ids)
