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
import socket
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FailureError, MisuseError
from ..files import open_locked, open_regular, whole_file
from ..records import read_record, sealed
from .manifest import AGAIN, StoreManifest, differing, read_json

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
def disk_full_is_a_failure(path: Path, needed: int) -> Iterator[None]:
    """A full disk while writing to ``path`` becomes a FailureError telling the ``needed`` bytes and those free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path).free
        raise FailureError(
            f"the disk of {path} is full: about {needed / 1e6:,.1f} MB more are needed, {free / 1e6:,.1f} MB are free; "
            f"what is written is safe: make room and {AGAIN} to go on from there"
        ) from None


def half_written(path: Path) -> StoreManifest | None:
    """The manifest of the store that was begun at ``path``, or None. FailureError when it is damaged."""
    name = "pending/manifest.json"
    return StoreManifest.from_json(path, read_json(path, name)) if (path / name).exists() else None


def begun_store(path: Path, manifest: StoreManifest, *may_differ: str) -> StoreManifest | None:
    """The manifest of the store of ``manifest`` that was begun at ``path``, None where nothing is.

    Library versions and the fields ``may_differ`` may be others. MisuseError as `StoreWriter.open_or_resume`.
    """
    if (path / "zarr.json").exists():
        shutil.rmtree(path / "pending", ignore_errors=True)  # left by a writer killed in the very last step
        raise MisuseError(f"{path} is already there and complete: give another path, or delete it first")
    begun = half_written(path)
    if begun is None:
        if path.exists() and (not path.is_dir() or {e.name for e in path.iterdir()} - {"pending", ".part"}):
            raise MisuseError(f"{path} is already there and is not a target store: give another path")
        return None
    asked = {name: value for name, value in manifest.to_json().items() if name not in ("versions", *may_differ)}
    different = "; ".join(differing(begun.to_json(), asked))
    if different:
        raise MisuseError(f"{path} was begun with other settings ({different}): give another path, or delete it first")
    return begun


def enter(path: Path, split: str | None) -> int:
    """The lock of the store at ``path``: alone, or, where workers of the same ``split`` have it, with them."""
    taken = f"{path}: another rob cache-teacher is writing this store; wait for it to finish"
    place, last = path / "pending" / "lock", time.monotonic() + PATIENCE
    place.parent.mkdir(parents=True, exist_ok=True)
    while (held := open_locked(place)) is None:
        if split is not None and (held := open_locked(place, shared=True)) is not None:
            if (theirs := _split(path)) == split:
                return held
            os.close(held)
            raise MisuseError(
                f"{path}: it is being written by {theirs}, and this is {split}: wait until they have ended, or start this "
                "as one of them"
            )
        if split is None or time.monotonic() > last:  # somebody writes it alone, and is not just beginning
            raise MisuseError(taken)
        time.sleep(0.02)
    if split is None:
        (place.parent / SPLIT).unlink(missing_ok=True)
    else:
        with disk_full_is_a_failure(path.parent, 0):
            beside(path)(f"pending/{SPLIT}", sealed({"split": split}))
    return held


def _split(path: Path) -> str | None:
    """The one that workers of the store at ``path`` have said."""
    with suppress(FailureError, FileNotFoundError):
        return read_record(path / "pending" / SPLIT, Split, AGAIN).split
    return None


def rows_done(path: Path, manifest: StoreManifest) -> int:
    """Rows of the store begun at ``path`` that are safe."""
    done = set(shards_done(path, manifest))
    chunks = sum(
        len(manifest.chunks(shard)) if shard in done else journalled(path, manifest, shard)
        for shard in range(manifest.num_shards)
    )
    return min(chunks * manifest.chunk_rows, manifest.num_images)


def shards_done(path: Path, manifest: StoreManifest) -> list[int]:
    """Those of the store begun at ``path`` that are whole."""
    pending = path / "pending"
    return [shard for shard in range(manifest.num_shards) if read_npz(pending / statistics_name(shard)) is not None]


def drop_damaged(path: Path) -> None:
    """What is damaged under pending/ is made again. What another worker writes meanwhile is whole."""
    for name in names(path):
        if name.endswith(".npz") and read_npz(path / "pending" / name) is None:
            (path / "pending" / name).unlink(missing_ok=True)


def journalled(path: Path, manifest: StoreManifest, shard: int) -> int:
    """How many chunks of a shard are journalled, up to the first that is missing or damaged."""
    chunks = manifest.chunks(shard)
    whole = (read_npz(path / "pending" / journal_name(chunk)) is not None for chunk in chunks)
    return next((number for number, is_whole in enumerate(whole) if not is_whole), len(chunks))


def names(path: Path) -> set[str]:
    """Of the files under pending/; none once the store is finished."""
    try:
        return set(os.listdir(path / "pending"))
    except FileNotFoundError:
        return set()


def journal_name(chunk: int) -> str:
    return f"chunk-{chunk:08d}.npz"


def statistics_name(shard: int) -> str:
    return f"shard-{shard:08d}.npz"


def beside(path: Path) -> Write:
    """Into a store that is being written. The temporary file is this process's own, and goes with pending/."""
    temporary = path / "pending" / f".part-{socket.gethostname()}-{os.getpid()}"
    return lambda name, data: replace_file(path / name, data, temporary)


def replace_file(path: Path, data: bytes, temporary: Path) -> None:
    with whole_file(path, temporary) as file:
        file.write(data)


# ==== arrays in files ====


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A NumPy archive, uncompressed; each array has the checksum that zip gives it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """What `npz` made a file of; None where there is none, or it is damaged."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.fstat(file.fileno()).st_size:
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
