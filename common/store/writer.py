"""Writing a target store so that it can be killed at any moment.

Each whole chunk is first journalled under pending/. When a shard's chunks are there, the shard's files are written,
then the progress is recorded, then the journalled chunks are dropped: killed between any two of these, the next run
goes on from the last whole chunk, and the finished store is byte for byte what an uninterrupted run writes.
"""

import errno
import io
import json
import os
import shutil
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

from ..errors import FailureError, MisuseError
from ..files import lock_file, open_regular, whole_file
from .manifest import AGAIN, StoreManifest, differing, read_json
from .shards import small_array_files, zarr_files


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


def _replace(root: Path, name: str, data: bytes) -> None:
    """Write ``root/name``, whole or not at all. One temporary name for all files: a killed run leaves one at most."""
    with whole_file(root / name, root / ".part") as file:
        file.write(data)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _write_array(root: Path, name: str, files: Mapping[str, bytes]) -> None:
    for file, data in files.items():
        _replace(root, f"{name}/{file}", data)


def write_group(root: Path, name: str, attributes: Mapping[str, Any]) -> None:
    """The Zarr group ``name`` ("" for the root, else "folder/") of the store at ``root``, whole or not at all."""
    _replace(root, f"{name}zarr.json", zarr_files(zarr.create_group, attributes=dict(attributes))["zarr.json"])


def write_extras(root: Path, prototypes: np.ndarray | None, statistics: Mapping[str, np.ndarray]) -> None:
    """The arrays that are not one row an image: ``prototypes`` (K, D) as float32, and ``statistics`` by name."""
    if prototypes is not None:
        _write_array(root, "prototypes", small_array_files(np.asarray(prototypes, np.float32)))
    if statistics:
        write_group(root, "statistics/", {})
    for name, values in sorted(statistics.items()):
        _write_array(root, f"statistics/{name}", small_array_files(values))


def half_written(path: Path) -> StoreManifest | None:
    """The manifest of the store that was begun at ``path``, or None. FailureError when it is damaged."""
    name = "pending/manifest.json"
    return StoreManifest.from_json(path, read_json(path, name)) if (path / name).exists() else None


class StoreWriter:
    """Appends whole chunks to a store until `finish`. One process at a time; get one from `open_or_resume`."""

    def __init__(self, path: Path, manifest: StoreManifest, lock: int) -> None:
        """``lock`` is what `lock_file` gave: closed with the writer."""
        self.path, self.manifest = path, manifest
        self._arrays = manifest.arrays()
        self._sums, self._flushed, self._pending = _progress(path)
        self._flush()  # a shard whose chunks were all journalled when the last run was killed
        self._unlock = weakref.finalize(self, os.close, lock)

    @classmethod
    def open_or_resume(cls, path: Path | str, manifest: StoreManifest) -> Self:
        """Start a store at ``path``, or go on with the one that a killed run left there (see `rows_done`).

        MisuseError when something else is there: other files, a complete store, one begun with other settings (library
        versions may differ), or one that another process is writing.
        """
        path = Path(path)
        begun_store(path, manifest)
        lock = lock_file(
            path / "pending" / "lock", f"{path}: another rob cache-teacher is writing this store; wait for it to finish"
        )
        try:
            begun = begun_store(path, manifest)  # by the process that held the lock until now
            if begun is None:
                with disk_full_is_a_failure(path.parent, 0):
                    _replace(path, "pending/manifest.json", json.dumps(manifest.to_json(), indent=2).encode())
            return cls(path, begun or manifest, lock)
        except BaseException:
            os.close(lock)
            raise

    @property
    def rows_done(self) -> int:
        """Rows that are safe: the next `append` starts here."""
        return min((self._flushed + self._pending) * self.manifest.chunk_rows, self.manifest.num_images)

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """The sums of the statistics of all rows done."""
        sums = dict(self._sums)
        for chunk in range(self._flushed, self._flushed + self._pending):
            _add(sums, _with_prefix(_read_journal(_journal(self.path, chunk)) or {}, "statistics/"))
        return sums

    def append(self, arrays: Mapping[str, np.ndarray], statistics: Mapping[str, np.ndarray] | None = None) -> None:
        """The next whole chunk: the encoding's ``arrays`` (rows, V, ...) for `chunk_rows` rows (fewer in the last one),
        and this chunk's ``statistics``, which are added up by name. FailureError when the disk is full.
        """
        rows = min(self.manifest.chunk_rows, self.manifest.num_images - self.rows_done)
        assert arrays.keys() == self._arrays.keys(), (arrays.keys(), self._arrays.keys())
        assert {len(values) for values in arrays.values()} == {rows}, "append one whole chunk"
        chunk = {
            f"chunk/{name}": np.frombuffer(array.encode_chunk(arrays[name]), np.uint8)
            for name, array in self._arrays.items()
        }
        sums = {f"statistics/{name}": np.asarray(values) for name, values in (statistics or {}).items()}
        journal = _journal(self.path, self._flushed + self._pending)
        with disk_full_is_a_failure(self.path, self._bytes_left()):
            _replace(self.path, str(journal.relative_to(self.path)), _npz(chunk | sums))
        self._pending += 1
        self._flush()

    def finish(self, prototypes: np.ndarray | None = None, statistics: Mapping[str, np.ndarray] | None = None) -> None:
        """Mark the store complete. ``prototypes`` (K, D) go in as float32; ``statistics``, if given, are stored instead
        of the sums (the property `statistics`).
        """
        assert self.rows_done == self.manifest.num_images, "finish comes after the last row"
        assert (prototypes is not None) == (self.manifest.num_prototypes > 0)
        with disk_full_is_a_failure(self.path, 0 if prototypes is None else prototypes.nbytes):
            for name, array in self._arrays.items():
                _write_array(self.path, name, array.metadata())
            write_extras(self.path, prototypes, self.statistics if statistics is None else statistics)
            write_group(self.path, "", self.manifest.to_json())
        shutil.rmtree(self.path / "pending", ignore_errors=True)  # whoever comes next removes what is left of it
        self._unlock()

    def _flush(self) -> None:
        """Turn each shard's worth of journalled chunks (or the last ones of all) into shard files."""
        while self._pending:
            shard, done = divmod(self._flushed, self.manifest.shard_chunks)
            assert done == 0, "only whole shards are ever flushed"
            count = min(self.manifest.shard_chunks, self.manifest.num_chunks - self._flushed)
            if self._pending < count:
                return
            chunks = range(self._flushed, self._flushed + count)
            found = [_read_journal(_journal(self.path, chunk)) for chunk in chunks]
            journals = [journal for journal in found if journal is not None]
            if len(journals) < len(found):  # damaged since this process began
                raise FailureError(f"{self.path}: {_journal(self.path, chunks[found.index(None)])} is damaged: {AGAIN}")
            sums = dict(self._sums)
            with disk_full_is_a_failure(self.path, self._bytes_left()):
                for name, array in self._arrays.items():
                    encoded = [journal[f"chunk/{name}"].tobytes() for journal in journals]
                    _replace(self.path, f"{name}/{array.shard_file(shard)}", array.assemble_shard(encoded))
                for journal in journals:
                    _add(sums, _with_prefix(journal, "statistics/"))
                state = sums | {"chunks done": np.array(self._flushed + count)}
                _replace(self.path, "pending/state.npz", _npz(state))
            self._sums, self._flushed, self._pending = sums, self._flushed + count, self._pending - count
            for chunk in chunks:
                _journal(self.path, chunk).unlink()

    def _bytes_left(self) -> int:
        """Bytes of the rows not yet done, before compression, and of the shard being put together."""
        manifest = self.manifest
        rows = manifest.num_images - self.rows_done + manifest.chunk_rows * manifest.shard_chunks
        return rows * len(manifest.view_ids) * manifest.bytes_per_view

    def kept(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """What ``make`` gives, made once for the store: a run that goes on after a kill finds the same arrays."""
        path = self.path / "pending" / f"{name}.npz"
        found = _read_journal(path)
        if found is None:
            found = dict(make())
            with disk_full_is_a_failure(self.path, self._bytes_left()):
                _replace(self.path, f"pending/{name}.npz", _npz(found))
        return found


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


def rows_done(path: Path, manifest: StoreManifest) -> int:
    """Rows of the store begun at ``path`` that are safe."""
    _, flushed, pending = _progress(path)
    return min((flushed + pending) * manifest.chunk_rows, manifest.num_images)


def _progress(path: Path) -> tuple[dict[str, np.ndarray], int, int]:
    """The statistics' sums over the chunks in shards, how many these are, and how many are journalled since: those before the
    first damaged one. FailureError: the sums themselves are damaged.
    """
    state = path / "pending" / "state.npz"
    sums = _read_journal(state) if state.exists() else {"chunks done": np.array(0)}
    if sums is None or "chunks done" not in sums:
        raise FailureError(f"{path} is damaged, {state} cannot be read: delete the store and {AGAIN}")
    flushed, pending = int(sums.pop("chunks done")), 0
    while _read_journal(_journal(path, flushed + pending)) is not None:
        pending += 1
    return sums, flushed, pending


def _read_journal(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file that `_npz` made, each of which has a checksum; None where there is none, or it is damaged."""
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


def _journal(path: Path, chunk: int) -> Path:
    return path / "pending" / f"chunk-{chunk:08d}.npz"


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def _add(sums: dict[str, np.ndarray], more: Mapping[str, np.ndarray]) -> None:
    """Add chunk by chunk, in order: floating-point sums are then the same however often the run was interrupted."""
    for name, values in more.items():
        sums[name] = sums[name] + values if name in sums else values
