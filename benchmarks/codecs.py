"""Bytes and speed of the codecs that a store's arrays could be compressed by: a part of ``rob bench store``."""

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from time import thread_time
from typing import Any

import numpy as np
from numcodecs import Blosc, Zstd, blosc  # type: ignore[attr-defined]

SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


def _codecs(chosen: int) -> Iterator[tuple[str, Any]]:
    """Each codec to compare."""
    for level in (1, 3, 6):
        yield f"blosc zstd {level}, shuffle {chosen}", Blosc("zstd", level, chosen)
    for shuffle in {Blosc.NOSHUFFLE, Blosc.SHUFFLE, Blosc.BITSHUFFLE} - {chosen}:
        yield f"blosc zstd 3, shuffle {shuffle}", Blosc("zstd", 3, shuffle)
    yield "blosc lz4 5, shuffle 2", Blosc("lz4", 5, Blosc.BITSHUFFLE)
    yield "plain zstd 3", Zstd(3)
    yield "none", Blosc("lz4", 0, Blosc.NOSHUFFLE)


def codec_rows(
    label: str, arrays: Mapping[str, np.ndarray], views: int, shuffle: str, rounds: int
) -> Iterator[dict[str, float | str]]:
    """Bytes and speed (of one core) of each codec at 256 rows a chunk, and of the chosen one at other sizes.

    ``arrays`` are an encoding's, of so many ``views`` in all; ``shuffle`` is the one that the store uses for it.
    """
    # As on the threads of the writer and the readers; and a thread's own time would leave blosc's out.
    blosc.use_threads = False
    chosen = SHUFFLES[shuffle]
    settings = [(256, name, codec) for name, codec in _codecs(chosen)]
    settings += [(rows, f"blosc zstd 3, shuffle {chosen}", Blosc("zstd", 3, chosen)) for rows in (64, 1024)]
    for rows, name, codec in settings:
        chunks = [np.ascontiguousarray(a[i : i + rows]) for a in arrays.values() for i in range(0, len(a), rows)]
        encoded = [codec.encode(chunk) for chunk in chunks]
        outs = [np.empty_like(chunk) for chunk in chunks]

        def compress(codec: Any = codec, chunks: list[np.ndarray] = chunks) -> None:
            for chunk in chunks:
                codec.encode(chunk)

        def decompress(codec: Any = codec, encoded: list[Any] = encoded, outs: list[np.ndarray] = outs) -> None:
            for data, out in zip(encoded, outs, strict=True):
                codec.decode(data, out)

        yield {
            "what": f"{label}, {rows} rows: {name}",
            "bytes_per_view": sum(len(data) for data in encoded) / views,
            "decode_views_per_second": views / _cpu_seconds(decompress, 4 * rounds),
            "encode_views_per_second": views / _cpu_seconds(compress, rounds),
        }


def _cpu_seconds(work: Callable[[], None], repeats: int) -> float:
    """Median CPU seconds of this thread: what codecs cost, whatever else the machine is doing."""
    seconds = []
    for _ in range(repeats):
        start = thread_time()
        work()
        seconds.append(thread_time() - start)
    return median(seconds)
