"""The target store: a Zarr v3 group with one row an image and one column a cached view, written once, read every epoch.

    targets.zarr/
      zarr.json             the group; its attributes are the manifest. Written last: without it there is no store
      embedding/ scale/     or ids/ logits/ tail/, or logits/: what the encoding stores, (N, V, ...), sharded
      patches_*/            the same of every patch, (N, V, P, ...), where the store has patch targets
      prototypes/           (K, D) float32, when the teacher has them
      statistics/*          sums that the objectives need later, gathered in the same pass
      pending/              only while being written, see begun.py

A chunk is `chunk_rows` consecutive rows with all their views, compressed, with its own crc32c.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import zarr
from torch import Tensor
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from ..errors import FailureError, MisuseError, first_line
from ..images.manifest import PackManifest
from ..places import Folder, local_path, place_of
from ..records import LARGEST, parsed
from .begun import disk_full_is_a_failure, half_written, rows_done
from .codec import decode, decode_patches
from .encodings import PATCHES, Encoding
from .manifest import AGAIN, CHECKSUM, StoreManifest, differing, read_json
from .shards import ChunkError, checksum_of
from .writer import StoreWriter, write_extras, write_group

LARGEST_SMALL = 1 << 35
"""Bytes of an array that is not one row an image: a million prototypes of 8192 dimensions."""

__all__ = ["StoreManifest", "StoreWriter", "TargetStore", "add_prototypes"]


class TargetStore:
    """A complete store, read by chunk, run or row. Safe to share between threads."""

    def __init__(self, path: Path, manifest: StoreManifest, sealed: bool = True) -> None:
        """``sealed``: it has checksums of its manifest and small arrays, too; False: it is of a rob from before them."""
        self.place, self.manifest, self.sealed = place_of(path), manifest, sealed
        self.path = local_path(path)
        self.encoding, self.patches = Encoding.from_dict(manifest.encoding), manifest.patch_encoding
        self.arrays = manifest.arrays()
        # (array, shard) -> where its chunks lie, read once
        self._indices: dict[tuple[str, int], np.ndarray] = {}
        self._reading: defaultdict[tuple[str, int], Lock] = defaultdict(Lock)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Reads the manifest only. MisuseError: nothing there, not a store, half-written, another format version.
        FailureError: a damaged manifest, or a file of targets is missing.
        """
        path, place = Path(path), place_of(path)
        if isinstance(place, Folder) and not place.path.exists():
            raise MisuseError(f"there is no target store at {place}: make one with rob cache-teacher")
        if place.exists("zarr.json"):
            attributes = read_json(place, "zarr.json").get("attributes", {})
            manifest = StoreManifest.from_json(place, attributes)
            store = cls(path, manifest, CHECKSUM in attributes["versions"])
            files = (
                f"{name}/{array.shard_file(shard)}"
                for name, array in store.arrays.items()
                for shard in range(store.manifest.num_shards)
            )
            if missing := place.missing(files):
                raise FailureError(f"{place} is damaged, {place}/{missing} is missing: delete the store and {AGAIN}")
            return store
        begun = half_written(place)
        if begun is None and isinstance(place, Folder):
            raise MisuseError(f"{place} is not a target store: make one with rob cache-teacher")
        if begun is None:
            raise MisuseError(f"there is no target store at {place}: make one with rob cache-teacher")
        done = f"{rows_done(place, begun):,} of {begun.num_images:,} rows are done"
        raise MisuseError(f"{place} is half-written, {done}: {AGAIN} to go on from there")

    def pooled(self) -> Self:
        """The same without its patch targets: those are neither read nor given room."""
        store = copy(self)
        store.arrays = {name: array for name, array in self.arrays.items() if not name.startswith(PATCHES)}
        return store

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk of all arrays in memory, decompressed."""
        return sum(array.chunk_bytes for array in self.arrays.values())

    def check_data(self, data: PackManifest) -> None:
        """MisuseError: the store is of other images than those of ``data``, or of those that it had before some were appended."""
        if (self.manifest.num_images, self.manifest.data_fingerprint) in data.grown:
            raise MisuseError(
                f"{self.place} has the first {self.manifest.num_images:,} of the {data.num_images:,} images, as others were "
                f"appended since: {AGAIN}, which adds their targets"
            )
        if self.manifest.data_fingerprint != data.fingerprint:
            raise MisuseError(
                f"{self.place} was cached from another data set: {self.manifest.num_images:,} images of fingerprint "
                f"{self.manifest.data_fingerprint[:16]}, not these {data.num_images:,} of {data.fingerprint[:16]} (rob inspect "
                "shows it): give the .beton that it was cached from, or cache again"
            )

    def check(self, **expected: Any) -> None:
        """MisuseError naming what differs between the manifest and the ``expected`` values of its fields, e.g.
        ``data_fingerprint``, ``recipe`` (a dict), ``seed``, ``teacher``.
        """
        plain = json.loads(json.dumps(expected))
        different = differing(self.manifest.to_json(), plain)
        if different:
            what = {"data_fingerprint": "another data set", "recipe": "another recipe", "teacher": "another teacher"}
            kind = next((text for name, text in what.items() if different[0].startswith(name)), "other settings")
            raise MisuseError(f"{self.place} was cached from {kind}: {'; '.join(different)}")

    def read_chunk(self, chunk: int, out: Mapping[str, np.ndarray]) -> None:
        """Chunk number ``chunk`` into ``out``'s arrays (chunk_rows, V, ...); rows past the last image are zeros.

        FailureError naming the chunk and the array when it is damaged.
        """
        for name, array in self.arrays.items():
            try:
                index = self._index(name, chunk // array.shard_chunks)
                array.read_chunk(self.place, name, chunk, index, out[name])
            except ChunkError as error:
                if (now := self._replaced_by()) is not None:
                    raise FailureError(
                        f"{self.place} was replaced while it was read, and has {len(now.view_ids)} views of {now.num_images:,} "
                        "images now: run the same command again"
                    ) from None
                first = chunk * array.chunk_rows
                raise FailureError(
                    f"{self.place}: chunk {chunk} of array {name!r} (images {first} to {first + array.chunk_rows - 1}) "
                    f"is damaged, {error}: delete the store and {AGAIN}"
                ) from None

    def _replaced_by(self) -> StoreManifest | None:
        """What is there now, where that is another store, such as the same with more views: then nothing is damaged."""
        try:
            now = StoreManifest.from_json(self.place, read_json(self.place, "zarr.json").get("attributes", {}))
        except (FailureError, MisuseError, OSError):
            return None
        return None if now == self.manifest else now

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start..stop-1 as stored: name -> (stop - start, V, ...). FailureError when a chunk is damaged."""
        assert 0 <= start < stop <= self.manifest.num_images, (start, stop)
        rows = self.manifest.chunk_rows
        first, last = start // rows, -(-stop // rows)
        run = self.empty(last - first)
        for chunk in range(first, last):
            self.read_chunk(chunk, {name: values[chunk - first] for name, values in run.items()})
        offset = first * rows
        return {
            name: values.reshape(-1, *values.shape[2:])[start - offset : stop - offset] for name, values in run.items()
        }

    def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of any image ``ids`` (B,) in their order, as stored. Decompresses every chunk it touches, once."""
        ids = np.asarray(ids)
        chunks, which = np.unique(ids // self.manifest.chunk_rows, return_inverse=True)
        buffer = self.empty(1)
        gathered = {name: np.empty((len(ids), *array.shape[1:]), array.dtype) for name, array in self.arrays.items()}
        for number, chunk in enumerate(chunks):
            self.read_chunk(int(chunk), {name: values[0] for name, values in buffer.items()})
            wanted = which == number
            for name, values in buffer.items():
                gathered[name][wanted] = values[0, ids[wanted] % self.manifest.chunk_rows]
        return gathered

    def decode(self, arrays: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
        """Arrays as stored -> as `codec.decode` and `decode_patches` give them, the latter's with ``patches_`` before their
        names.
        """
        decoded = decode(self.encoding, arrays)
        if self.patches is not None and any(name.startswith(PATCHES) for name in arrays):
            decoded |= {PATCHES + name: values for name, values in decode_patches(self.patches, arrays).items()}
        return decoded

    def empty(self, num_chunks: int) -> dict[str, np.ndarray]:
        """Room for ``num_chunks`` chunks: name -> uninitialised (num_chunks, chunk_rows, V, ...)."""
        return {name: np.empty((num_chunks, *array.chunk_shape), array.dtype) for name, array in self.arrays.items()}

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
        """Read every chunk, and what is stored once; one sentence for each that is damaged. ``progress`` is told (chunks read,
        all of them)."""

        def problem(chunk: int) -> str | None:
            try:
                self.read_chunk(chunk, {name: values[0] for name, values in self.empty(1).items()})
            except FailureError as error:
                return str(error)
            return None

        damaged = []
        with ThreadPoolExecutor(self.place.at_once) as pool:
            for done, found in enumerate(pool.map(problem, range(self.manifest.num_chunks)), 1):
                damaged += [found] if found else []
                progress(done, self.manifest.num_chunks)
        try:
            _ = self.prototypes, self.statistics  # reading them checks them
        except FailureError as error:
            damaged.append(str(error))
        return damaged

    @cached_property
    def prototypes(self) -> np.ndarray | None:
        """(K, D) float32, or None when the teacher has none."""
        return self._small_array("prototypes") if self.manifest.num_prototypes else None

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """The sums gathered while caching, by name; ``embedding_sum`` (D,) float64 is always among them. FailureError when
        it is not, or one is damaged.
        """
        files = sorted(name.partition("/") for name in self.place.names("statistics"))
        names = [name for name, _, file in files if file == "zarr.json"]
        if "embedding_sum" not in names:
            raise FailureError(
                f"{self.place}: array 'statistics/embedding_sum' is missing: delete the store and {AGAIN}"
            )
        return {name: self._small_array(f"statistics/{name}") for name in names}

    def _small_array(self, name: str) -> np.ndarray:
        try:
            parsed(self.place.read(f"{name}/zarr.json", LARGEST))
            array = zarr.open_array(self._files_of(name), mode="r")
            if array.nbytes > LARGEST_SMALL:
                raise ValueError(f"it is said to have {array.nbytes:,} bytes")
            if array.nchunks_initialized < array.nchunks:  # Zarr would read zeros
                raise OSError("its file is missing")
            values = np.asarray(array[...])
            sealed = array.attrs.get("crc32c")
            if sealed != checksum_of(values) and (sealed is not None or self.sealed):
                raise ValueError("its checksum does not match")
            return values
        except Exception as error:  # zarr and its codecs raise about every kind on a damaged file
            message = f"{self.place}: array {name!r} is damaged ({first_line(error)}): delete the store and {AGAIN}"
            raise FailureError(message) from None

    def _index(self, name: str, shard: int) -> np.ndarray:
        key = name, shard
        if key not in self._indices:
            with self._reading[key]:  # neighbouring chunks are read at the same time, and would each ask for it
                if key not in self._indices:
                    self._indices[key] = self.arrays[name].read_index(self.place, name, shard)
        return self._indices[key]

    def _files_of(self, name: str) -> Path | MemoryStore:
        """What Zarr reads a small array from."""
        if isinstance(self.place, Folder):
            return self.place.path / name
        files = {file: self.place.read(f"{name}/{file}") for file in self.place.names(name)}
        return MemoryStore({file: cpu.Buffer.from_bytes(data) for file, data in files.items()})


def add_prototypes(
    path: Path | str,
    prototypes: np.ndarray,
    head: str,
    teacher_temp: float,
    statistics: Mapping[str, np.ndarray] | None = None,
) -> TargetStore:
    """Give a complete `embedding` store without prototypes the fitted ``prototypes`` (K, D), the name of their
    ``head``, and ``statistics`` about them. Killed at any moment, the store is either without them or with them.
    """
    store = TargetStore.open(path)
    if store.manifest.num_prototypes or store.encoding.kind != "embedding":
        raise MisuseError(f"{path} has prototypes already: cache the embeddings again to fit others")
    assert prototypes.shape[1] == store.manifest.dim
    manifest = replace(store.manifest, num_prototypes=len(prototypes), head=head, teacher_temp=teacher_temp)
    with disk_full_is_a_failure(store.place, prototypes.nbytes):
        write_extras(store.place.write, prototypes, statistics or {})
        write_group(store.place.write, "", manifest.to_json())
    return TargetStore.open(path)
