"""Shard files of Zarr v3 arrays (the `sharding_indexed` codec): chunks one after another, then the index of it.

The target store's arrays are ordinary Zarr v3, read by any implementation. Going through zarr-python would cost 1 ms
of event loop a chunk, many times what checking and decompressing it takes (benchmarks/store.py), and give zeros for a
chunk that is missing. It makes the metadata here, and the tests read the arrays back with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]
from zarr.abc.buffer import Buffer
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from ..places import Place
from ..records import crc32c

blosc.use_threads = False  # bytes must not depend on which thread finishes first; callers run many chunks side by side

COMPRESSOR = {"cname": "zstd", "clevel": 3}
"""Blosc's settings for every array: the smallest in benchmarks/store.py's table but for slow levels that gain 2 %."""

LARGEST_CHUNK = (1 << 31) - 17
"""Bytes of one array's chunk that Blosc takes."""
_NOWHERE = np.iinfo(np.uint64).max  # the index entry of a chunk that was never written


class ChunkError(Exception):
    """A chunk that is missing or does not pass its checksum; the message is the reason in a few words."""


@dataclass(frozen=True)
class ShardedArray:
    """An array chunked and sharded along its first axis only.

    ``shape`` (N, ...) and ``dtype`` of the whole; a chunk is ``chunk_rows`` rows, a shard ``shard_chunks`` chunks.
    ``shuffle`` ("noshuffle", "shuffle" or "bitshuffle") is what Blosc does before compressing; any of them is read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    shard_chunks: int
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] = "bitshuffle"

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Before compression."""
        return prod(self.chunk_shape) * self.dtype.itemsize

    def metadata(self) -> Mapping[str, bytes]:
        """The array's files other than its shards: {"zarr.json": ...}."""
        return zarr_files(
            zarr.create_array,
            shape=self.shape,
            dtype=self.dtype,
            chunks=self.chunk_shape,
            shards=(self.chunk_rows * self.shard_chunks, *self.shape[1:]),
            compressors=[BloscCodec(typesize=self.dtype.itemsize, shuffle=self.shuffle, **COMPRESSOR), Crc32cCodec()],
        )

    def shard_file(self, shard: int) -> str:
        """The shard's path inside the array's folder."""
        return "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    def encode_chunk(self, rows: np.ndarray) -> bytes:
        """Rows (<= chunk_rows, ...), padded with zeros to a whole chunk -> compressed bytes and their crc32c."""
        assert (rows.shape[1:], rows.dtype) == (self.shape[1:], self.dtype), (rows.shape, rows.dtype)
        chunk = np.zeros(self.chunk_shape, self.dtype)
        chunk[: len(rows)] = rows
        shuffle = getattr(blosc, self.shuffle.upper())
        data = blosc.compress(chunk, COMPRESSOR["cname"].encode(), COMPRESSOR["clevel"], shuffle, 0)
        return data + google_crc32c.value(data).to_bytes(4, "little")

    def decode_chunk(self, data: bytes, out: np.ndarray) -> None:
        """The inverse of `encode_chunk` into ``out``, a contiguous whole chunk. Raises ChunkError on any damage."""
        compressed = np.frombuffer(data, np.uint8)[:-4]  # not a copy
        if google_crc32c.value(compressed) != int.from_bytes(data[-4:], "little"):
            raise ChunkError("its checksum does not match")
        if int.from_bytes(data[4:8], "little") != out.nbytes:  # as Blosc's header says
            raise ChunkError("it is of another size")
        blosc.decompress(compressed, out)

    def assemble_shard(self, chunks: list[bytes]) -> bytes:
        """A shard file out of its first ``len(chunks)`` encoded chunks, in order."""
        index = np.full((self.shard_chunks, 2), _NOWHERE, "<u8")
        lengths = np.array([len(chunk) for chunk in chunks], "<u8")
        index[: len(chunks), 0] = np.cumsum(lengths) - lengths
        index[: len(chunks), 1] = lengths
        table = index.tobytes()
        return b"".join([*chunks, table, google_crc32c.value(table).to_bytes(4, "little")])

    def read_index(self, place: Place, name: str, shard: int) -> np.ndarray:
        """Where the shard's chunks lie in the array ``name``: (shard_chunks, 2) byte offset and length. Raises ChunkError."""
        try:
            table = place.read_end(f"{name}/{self.shard_file(shard)}", 16 * self.shard_chunks + 4)
        except OSError as error:
            raise ChunkError(f"its shard file cannot be read ({error.strerror})") from None
        if google_crc32c.value(table[:-4]) != int.from_bytes(table[-4:], "little"):
            raise ChunkError("the checksum of its shard's index does not match")
        return np.frombuffer(table[:-4], "<u8").reshape(-1, 2)

    def read_chunk(self, place: Place, name: str, chunk: int, index: np.ndarray, out: np.ndarray) -> None:
        """Chunk number ``chunk`` of the array ``name`` into ``out``, given its shard's `read_index`.

        Raises ChunkError. Safe in threads: reading and decompressing release the interpreter's lock.
        """
        shard, number = divmod(chunk, self.shard_chunks)
        offset, length = (int(entry) for entry in index[number])
        if offset == _NOWHERE:
            raise ChunkError("it was never written")
        try:
            data = place.read_part(f"{name}/{self.shard_file(shard)}", offset, length)
        except OSError as error:
            raise ChunkError(f"its shard file cannot be read ({error.strerror})") from None
        if len(data) != length:
            raise ChunkError("its shard file is too short")
        self.decode_chunk(data, out)


def small_array_files(values: np.ndarray) -> Mapping[str, bytes]:
    """Every file of an unsharded Zarr v3 array that holds ``values``, by path inside the array's folder."""
    rows = max(1, (64 << 20) // max(1, values[:1].nbytes)) if values.ndim else 1  # chunks of up to 64 MiB
    chunks = (min(rows, max(1, len(values))), *values.shape[1:]) if values.ndim else ()
    return zarr_files(
        zarr.create_array,
        data=values,
        chunks=chunks,
        attributes={"crc32c": checksum_of(values)},
        compressors=[BloscCodec(typesize=values.dtype.itemsize, **COMPRESSOR), Crc32cCodec()],
        config={"write_empty_chunks": True},
    )


def checksum_of(values: np.ndarray) -> str:
    """Of an array's type, shape and values: what its own metadata might say otherwise."""
    return crc32c(
        f"{values.dtype.str} {values.shape}".encode(), np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    )


def zarr_files(create: Callable[..., object], **settings: Any) -> Mapping[str, bytes]:
    """What ``zarr.create_array`` or ``zarr.create_group`` would write into an empty folder: path -> bytes."""
    files: dict[str, Buffer] = {}
    create(MemoryStore(files), **settings)
    return {path: buffer.to_bytes() for path, buffer in sorted(files.items())}
