"""Writing a target store, by one process or by many, each of which may be killed at any moment.

The unit of work is a shard. A worker claims one, journals each whole chunk of it under pending/, and when all are there
writes the shard's files, then its statistics, with which it is done, then drops the journal. Killed between any two of
these, whoever claims the shard next goes on from its last whole chunk. Whoever finds all shards done finishes the store:
byte for byte what one uninterrupted process writes, since sums are taken in the order of the rows.
"""

import json
import os
import time
import weakref
from collections.abc import Callable, Mapping, Set
from contextlib import nullcontext, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr

from ..errors import FailureError
from ..files import lock, locked
from ..places import local_path, place_of
from .begun import (
    Write,
    add,
    begun_store,
    disk_full_is_a_failure,
    drop_damaged,
    enter,
    from_npz,
    journal_name,
    journalled,
    names,
    npz,
    read_npz,
    stacked,
    statistics_name,
    with_prefix,
)
from .manifest import AGAIN, StoreManifest
from .shards import small_array_files, zarr_files


def _write_array(write: Write, name: str, files: Mapping[str, bytes]) -> None:
    for file, data in files.items():
        write(f"{name}/{file}", data)


def write_group(write: Write, name: str, attributes: Mapping[str, Any]) -> None:
    """The Zarr group ``name``: "" for the root, else "folder/"."""
    write(f"{name}zarr.json", zarr_files(zarr.create_group, attributes=dict(attributes))["zarr.json"])


def write_extras(write: Write, prototypes: np.ndarray | None, statistics: Mapping[str, np.ndarray]) -> None:
    """The arrays that are not one row an image: ``prototypes`` (K, D) as float32, and ``statistics`` by name."""
    if prototypes is not None:
        _write_array(write, "prototypes", small_array_files(np.asarray(prototypes, np.float32)))
    if statistics:
        write_group(write, "statistics/", {})
    for name, values in sorted(statistics.items()):
        _write_array(write, f"statistics/{name}", small_array_files(values))


class StoreWriter:
    """Writes the chunks of a store, a shard at a time, and finishes it. Get one from `open_or_resume`."""

    def __init__(self, path: Path, manifest: StoreManifest, held: int, shared: bool) -> None:
        """``held`` is the lock of the store, alone or ``shared`` with other workers: closed with the writer."""
        self.path, self.place, self.manifest, self.shared = path, place_of(path), manifest, shared
        self._arrays = manifest.arrays()
        self._journal: dict[str, bytes] = {}  # of the shard that is claimed, where nobody can hold one: see `_keep`
        self._claimed: int | None = None
        self._lock: int | None = None  # of the shard that is claimed, where there are other workers
        self._pending = 0  # chunks of it that are journalled
        if self.place.has_locks:  # what is in a bucket is whole
            drop_damaged(self.place)
        self._unlock = weakref.finalize(self, os.close, held)

    @classmethod
    def open_or_resume(cls, path: Path | str, manifest: StoreManifest, split: str | None = None) -> Self:
        """Start a store at ``path``, or go on with the one that killed runs left there (see `rows_done`).

        Without ``split`` this is the only process that writes it. With one, any number of workers share the store while they
        name the same ``split``, a word for how they divide the work; which of them makes what is theirs to say.

        MisuseError when something else is there: other files, a complete store, one begun with other settings (library
        versions may differ), or one that other processes are writing, alone or by another split.
        """
        path, place = local_path(path), place_of(path)
        begun_store(place, manifest)
        held = enter(place, split)
        try:
            begun = begun_store(place, manifest)  # by whoever held the lock until now
            if begun is None:
                with disk_full_is_a_failure(place, 0):
                    place.write("pending/manifest.json", json.dumps(manifest.to_json(), indent=2).encode())
            if split is not None:
                lock(held, shared=True)  # now that all is there that others go by
            return cls(path, begun or manifest, held, split is not None)
        except BaseException:
            os.close(held)
            raise

    # ==== what is there ====

    @property
    def rows_done(self) -> int:
        """Rows that are safe, whichever worker made them."""
        found, manifest = names(self.place) | self._journal.keys(), self.manifest
        if not found:  # another worker has finished the store
            return manifest.num_images
        chunks, missing = 0, set(self._missing(found))
        for shard in range(manifest.num_shards):
            of_shard = manifest.chunks(shard)
            whole = shard not in missing
            chunks += (
                len(of_shard) if whole else sum(1 for _ in takewhile(lambda c: journal_name(c) in found, of_shard))
            )
        return min(chunks * manifest.chunk_rows, manifest.num_images)

    def missing(self) -> list[int]:
        """The shards that are not done; none, too, when another worker has finished the store, and maybe put it elsewhere."""
        return self._missing(names(self.place))

    def _missing(self, found: Set[str]) -> list[int]:
        """The same by the ``found`` files under pending/, of which a bucket's list takes its time."""
        if "manifest.json" not in found or self.place.exists("zarr.json"):
            return []
        return [shard for shard in range(self.manifest.num_shards) if statistics_name(shard) not in found]

    @property
    def next_row(self) -> int:
        """Where `append` goes on: in the shard that is claimed, else in the first that is missing, which is claimed; behind the
        last row when none is."""
        while self._claimed is None and (missing := self.missing()):
            row = self.claim(missing[0])
            assert row is not None or not self.shared, "with other workers, claim a shard first"
        return self.manifest.num_images if self._claimed is None else self._next

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """The sums of the statistics of all shards, which are done."""
        sums: dict[str, np.ndarray] = {}
        for shard in range(self.manifest.num_shards):
            if (stored := read_npz(self.place, statistics_name(shard))) is None:
                raise FailureError(f"{self.place}: pending/{statistics_name(shard)} is damaged: {AGAIN}")
            add(sums, stored)
        return sums

    # ==== a shard ====

    def claim(self, shard: int) -> int | None:
        """Take ``shard``; the row that `append` goes on at. None: it is done, or another worker has it."""
        if self._claimed == shard:
            return self._next
        self._release()
        if self.shared:
            self._lock = self._locked(f"shard-{shard:08d}.lock")
        found = names(self.place)
        if (self.shared and self._lock is None) or shard not in self._missing(found):
            self._release()
            return None
        self._claimed, self._pending = shard, journalled(self.place, self.manifest, shard)
        for chunk in self.manifest.chunks(shard)[self._pending :]:  # behind one that was damaged
            if journal_name(chunk) in found:
                self.place.remove(f"pending/{journal_name(chunk)}")
        self._flush()  # all its chunks were journalled when another worker was killed
        return None if self._claimed is None else self._next

    def append(self, arrays: Mapping[str, np.ndarray], statistics: Mapping[str, np.ndarray] | None = None) -> None:
        """The next whole chunk, at `next_row`: the encoding's ``arrays`` (rows, V, ...) for `chunk_rows` rows (fewer in the last
        one of all), and this chunk's ``statistics``, which are added up by name. FailureError when the disk is full.
        """
        start = self.next_row
        rows = min(self.manifest.chunk_rows, self.manifest.num_images - start)
        assert arrays.keys() == self._arrays.keys(), (arrays.keys(), self._arrays.keys())
        assert {len(values) for values in arrays.values()} == {rows}, "append one whole chunk"
        chunk = {
            f"chunk/{name}": np.frombuffer(array.encode_chunk(arrays[name]), np.uint8)
            for name, array in self._arrays.items()
        }
        sums = {f"statistics/{name}": np.asarray(values) for name, values in (statistics or {}).items()}
        self._keep(journal_name(start // self.manifest.chunk_rows), npz(chunk | sums))
        self._pending += 1
        self._flush()

    def start(self, shard: int) -> int:
        """The row that a shard that is not claimed would go on at."""
        return self.manifest.rows(shard).start + journalled(self.place, self.manifest, shard) * self.manifest.chunk_rows

    @property
    def _next(self) -> int:
        assert self._claimed is not None
        return (self._claimed * self.manifest.shard_chunks + self._pending) * self.manifest.chunk_rows

    def _flush(self) -> None:
        """Turn the claimed shard's journalled chunks into its files once all are there, and let it go."""
        assert self._claimed is not None
        shard, chunks = self._claimed, self.manifest.chunks(self._claimed)
        if self._pending < len(chunks):
            return
        files = [journal_name(chunk) for chunk in chunks]
        journals = []
        for file in files:
            own = self._journal.get(file)
            if (journal := read_npz(self.place, file) if own is None else from_npz(own)) is None:
                raise FailureError(f"{self.place}: pending/{file} is damaged: {AGAIN}")  # since it was counted
            journals.append(journal)
        with disk_full_is_a_failure(self.place, self._bytes_left()):
            for name, array in self._arrays.items():
                encoded = [journal[f"chunk/{name}"].tobytes() for journal in journals]
                self.place.write(f"{name}/{array.shard_file(shard)}", array.assemble_shard(encoded))
            sums = stacked([with_prefix(journal, "statistics/") for journal in journals])
            self.place.write(f"pending/{statistics_name(shard)}", npz(sums))
        if self.place.has_locks:
            for file in files:
                self.place.remove(f"pending/{file}")  # by now another worker may have finished the store
        self._release()

    def _keep(self, name: str, journal: bytes) -> None:
        """A chunk that is whole, under pending/. Where nobody can hold a shard, another worker may be at the same one: then in
        memory, and a kill costs the shard."""
        if not self.place.has_locks:
            self._journal[name] = journal
            return
        with disk_full_is_a_failure(self.place, self._bytes_left()):
            self.place.write(f"pending/{name}", journal)

    def _locked(self, name: str) -> int | None:
        """The lock of a file under pending/; None: another worker has it, or has finished the store, and the folder went."""
        with suppress(FileNotFoundError):
            return self.place.lock(f"pending/{name}")
        return None

    def _release(self) -> None:
        self._journal.clear()
        self._claimed, held, self._lock = None, self._lock, None
        if held is not None:
            os.close(held)

    # ==== the end ====

    def finish(
        self,
        prototypes: np.ndarray | None = None,
        more: Mapping[str, np.ndarray] | None = None,
        before: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Mark the store complete. ``prototypes`` (K, D) go in as float32, and ``more`` statistics beside the sums, or else those
        of ``before``, a store that got more, to which the sums are added. Of several workers the first does it, and the others
        wait for it.
        """
        assert not self.missing(), "finish comes after the last row"
        assert (prototypes is not None) == (self.manifest.num_prototypes > 0)
        finishing = None
        complete = partial(self.place.exists, "zarr.json")
        while self.shared and not complete() and (finishing := self._locked("finish.lock")) is None:
            time.sleep(0.05)
        self._lock = finishing
        try:
            if not complete():
                statistics = self.statistics
                if before is not None:
                    statistics = {name: there + statistics.get(name, 0) for name, there in before.items()}
                with disk_full_is_a_failure(self.place, 0 if prototypes is None else prototypes.nbytes):
                    for name, array in self._arrays.items():
                        _write_array(self.place.write, name, array.metadata())
                    write_extras(self.place.write, prototypes, statistics | dict(more or {}))
                    write_group(self.place.write, "", self.manifest.to_json())
                self.place.remove_all("pending")  # whoever comes next removes what is left of it
        except (FailureError, FileNotFoundError):
            if self.place.has_locks or not complete():
                raise
            # In a bucket another worker may finish the store at any time, and drop what is under pending/.
        self._release()
        self._unlock()

    def kept(self, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """What ``make`` gives, made once for the store: a run that goes on, and other workers, find the same arrays."""
        own = locked(self.path / "pending" / f"{name}.lock", f"{self.place}: {name} is being made", wait=True)
        with own if self.place.has_locks else nullcontext():
            if (found := read_npz(self.place, f"{name}.npz")) is None:
                found = dict(make())
                with disk_full_is_a_failure(self.place, self._bytes_left()):
                    self.place.write(f"pending/{name}.npz", npz(found))
        return found

    def _bytes_left(self) -> int:
        """Bytes of the rows not yet done, before compression, and of the shard being put together."""
        manifest = self.manifest
        rows = manifest.num_images - self.rows_done + manifest.chunk_rows * manifest.shard_chunks
        return rows * len(manifest.view_ids) * manifest.bytes_per_view
