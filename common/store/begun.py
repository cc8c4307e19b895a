"""A store that is being written: what lies under its pending/ until it is whole.

manifest.json             what the store will be
lock, split.json          held by one worker, or shared by many that divide the work in one way
chunk-00000017.npz        a chunk of a shard that is not whole, and its statistics
shard-00000001.npz        the statistics of a shard that is whole, with its files in place
shard-00000001.lock       held by the worker that makes this shard
"""

import errno
import io
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from ..errors import FailureError, MisuseError
from ..places import Folder, Place
from ..records import DamagedError, sealed, unsealed
from .manifest import AGAIN, StoreManifest, read_json

PATIENCE = 5.0
"""Seconds that a worker waits for another one that begins a store."""
SPLIT = "split.json"
"""Under pending/: how the workers of now divide the work."""


@dataclass(frozen=True)
class Split:
    split: str


Write = Callable[[str, bytes], None]
"""Writes the file of that name in a store, whole or not at all."""


@contextmanager
def disk_full_is_a_failure(place: Place, needed: int) -> Iterator[None]:
    """A full disk while writing to ``place`` becomes a FailureError telling the ``needed`` bytes and those free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not isinstance(place, Folder):
            raise
        free = shutil.disk_usage(place.path if place.path.exists() else place.path.parent).free
        raise FailureError(
            f"the disk of {place} is full: about {needed / 1e6:,.1f} MB more are needed, {free / 1e6:,.1f} MB are free; "
            f"what is written is safe: make room and {AGAIN} to go on from there"
        ) from None


def half_written(place: Place) -> StoreManifest | None:
    """The manifest of the store that was begun at ``place``, or None. FailureError when it is damaged."""
    name = "pending/manifest.json"
    return StoreManifest.from_json(place, read_json(place, name)) if place.exists(name) else None


def drop_leftovers(place: Place) -> None:
    """Of the complete store at ``place``: what a writer left that was killed in its very last step, which in a bucket takes a
    while."""
    place.remove_all("pending")


def begun_store(place: Place, manifest: StoreManifest, *may_differ: str) -> StoreManifest | None:
    """The manifest of the store of ``manifest`` that was begun at ``place``, None where nothing is.

    Library versions and the fields ``may_differ`` may be others. MisuseError as `StoreWriter.open_or_resume`.
    """
    if place.exists("zarr.json"):
        drop_leftovers(place)
        raise MisuseError(f"{place} is already there and complete: give another path, or delete it first")
    begun = half_written(place)
    if begun is None:
        if place.holds_other({"pending", ".part"}):
            raise MisuseError(f"{place} is already there and is not a target store: give another path")
        return None
    if different := begun.differences(manifest, *may_differ):
        raise MisuseError(f"{place} was begun with other settings ({different}): give another path, or delete it first")
    return begun


def enter(place: Place, split: str | None) -> int:
    """The lock of the store at ``place``: alone, or, where workers of the same ``split`` have it, with them."""
    taken = f"{place}: another rob cache-teacher is writing this store; wait for it to finish"
    last = time.monotonic() + PATIENCE
    if isinstance(place, Folder):
        (place.path / "pending").mkdir(parents=True, exist_ok=True)
    while (held := place.lock("pending/lock")) is None:
        if split is not None and (held := place.lock("pending/lock", shared=True)) is not None:
            if (theirs := _split(place)) == split:
                return held
            os.close(held)
            raise MisuseError(
                f"{place}: it is being written by {theirs}, and this is {split}: wait until they have ended, or start this "
                "as one of them"
            )
        if split is None or time.monotonic() > last:  # somebody writes it alone, and is not just beginning
            raise MisuseError(taken)
        time.sleep(0.02)
    if split is None:
        place.remove(f"pending/{SPLIT}")
    else:
        with disk_full_is_a_failure(place, 0):
            place.write(f"pending/{SPLIT}", sealed({"split": split}))
    return held


def _split(place: Place) -> str | None:
    """The one that workers of the store at ``place`` have said."""
    with suppress(DamagedError, FileNotFoundError):
        return unsealed(place.read(f"pending/{SPLIT}"), Split).split
    return None


def rows_done(place: Place, manifest: StoreManifest) -> int:
    """Rows of the store begun at ``place`` that are safe."""
    done = set(shards_done(place, manifest))
    chunks = sum(
        len(manifest.chunks(shard)) if shard in done else journalled(place, manifest, shard)
        for shard in range(manifest.num_shards)
    )
    return min(chunks * manifest.chunk_rows, manifest.num_images)


def shards_done(place: Place, manifest: StoreManifest) -> list[int]:
    """Those of the store begun at ``place`` that are whole."""
    found = names(place)
    done = (shard for shard in range(manifest.num_shards) if statistics_name(shard) in found)
    return [shard for shard in done if read_npz(place, statistics_name(shard)) is not None]


def drop_damaged(place: Place) -> None:
    """What is damaged under pending/ is made again. What another worker writes meanwhile is whole."""
    for name in names(place):
        if name.endswith(".npz") and read_npz(place, name) is None:
            place.remove(f"pending/{name}")


def journalled(place: Place, manifest: StoreManifest, shard: int) -> int:
    """How many chunks of a shard are journalled, up to the first that is missing or damaged."""
    if not place.has_locks:
        return 0  # where nobody can hold a shard, a worker keeps the chunks of its own to itself
    chunks = manifest.chunks(shard)
    whole = (read_npz(place, journal_name(chunk)) is not None for chunk in chunks)
    return next((number for number, is_whole in enumerate(whole) if not is_whole), len(chunks))


def names(place: Place) -> Set[str]:
    """Of the files under pending/; none once the store is finished."""
    return place.names("pending")


def journal_name(chunk: int) -> str:
    return f"chunk-{chunk:08d}.npz"


def statistics_name(shard: int) -> str:
    return f"shard-{shard:08d}.npz"


# ==== arrays in files ====


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A NumPy archive, uncompressed; each array has the checksum that zip gives it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_npz(place: Place, name: str) -> dict[str, np.ndarray] | None:
    """What `npz` made the file ``name`` under pending/ of; None where there is none, or it is damaged."""
    try:
        return from_npz(place.read(f"pending/{name}"))
    except OSError:
        return None


def from_npz(data: bytes) -> dict[str, np.ndarray] | None:
    """What `npz` made ``data`` of; None: it is damaged."""
    try:
        file = io.BytesIO(data)
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(data):
                return None  # nothing there is compressed
            file.seek(0)
            return dict(np.load(file, allow_pickle=False))
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        SyntaxError,
        zipfile.BadZipFile,
    ):
        return None


def with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def stacked(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The statistics of a shard's chunks, to be added up later: one row a chunk, since sums of floats go by their order; of
    counts, which are large, one row for all."""
    rows = {name: np.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: values if values.dtype.kind == "f" else values.sum(0, keepdims=True) for name, values in rows.items()}


def add(sums: dict[str, np.ndarray], shard: Mapping[str, np.ndarray]) -> None:
    """Add a shard's `stacked` statistics row by row: in the same order, however the work was shared or interrupted."""
    for name, rows in shard.items():
        for values in rows:
            sums[name] = sums[name] + values if name in sums else values
