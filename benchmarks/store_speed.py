"""How fast a store of targets is read, and how else it could be: a part of ``rob bench store``."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import zarr

from rob.benchmarks.report import median_of
from rob.common.order import block_shuffled_order
from rob.common.store.prefetch import TargetPrefetcher, window_blocks
from rob.common.store.reader import TargetStore


@dataclass(frozen=True)
class Reading:
    """How targets are read: in batches onto a device, by so many threads in a window, each way ``rounds`` times."""

    device: torch.device
    batch_size: int
    window_mib: float
    threads: int
    rounds: int


def reading_speeds(store: TargetStore, how: Reading) -> dict[str, float]:
    """Images/s of each way to read, all ending with tensors on the device; the sides take turns. "sequential" is one loop
    over the chunks as they lie, "threads" the same with as many threads as the prefetcher reads with.
    """
    num_images, chunk_rows = store.manifest.num_images, store.manifest.chunk_rows
    order = block_shuffled_order(num_images, chunk_rows, window_blocks(store, how.window_mib), seed=0, epoch=0)
    some = order[:: max(1, num_images // (4 * how.batch_size))]  # four batches of rows from everywhere
    rng = np.random.default_rng(0)
    group = zarr.open_group(store.path, mode="r")
    opened = {name: group[name] for name in store.arrays}  # once, as ours are
    pool = ThreadPoolExecutor(how.threads)

    def use(arrays: Mapping[str, np.ndarray]) -> None:
        store.decode({name: torch.from_numpy(values).to(how.device) for name, values in arrays.items()})

    def sequential(read: Callable[[int, Mapping[str, np.ndarray]], None], threads: int = 1) -> int:
        def part(thread: int) -> None:
            buffer = {name: values[0] for name, values in store.empty(1).items()}
            for chunk in range(thread, store.manifest.num_chunks, threads):
                read(chunk, buffer)
                use(buffer)

        for done in [pool.submit(part, thread) for thread in range(threads)]:
            done.result()
        return num_images

    def zarr_chunk(chunk: int, out: Mapping[str, np.ndarray]) -> None:
        for name, values in out.items():
            values[:] = opened[name][chunk * chunk_rows : (chunk + 1) * chunk_rows]  # type: ignore[index]

    def random_rows() -> int:
        ids = rng.permutation(some)
        for start in range(0, len(ids), how.batch_size):
            use(store.rows(ids[start : start + how.batch_size]))
        return len(ids)

    with TargetPrefetcher(
        store, how.batch_size, window_mib=how.window_mib, threads=how.threads, device=how.device
    ) as prefetcher:
        sides: dict[str, Callable[[], int]] = {
            "sequential": lambda: sequential(store.read_chunk),
            "sequential, threads": lambda: sequential(store.read_chunk, how.threads),
            "training order": lambda: sum(len(batch.image_ids) for batch in prefetcher.epoch(order)),
            "random rows": random_rows,
            "sequential, zarr-python": lambda: sequential(zarr_chunk),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(how.rounds + 1):
            for name, side in sides.items():
                start = perf_counter()
                images = side()
                if how.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append((perf_counter() - start) / images)
    pool.shutdown()
    return {name: 1 / median(values[1:]) for name, values in seconds.items()}


def sequential_speed(store: TargetStore, rounds: int) -> float:
    """Images/s of checking and decompressing all chunks in one loop."""
    return store.manifest.num_images / median_of(store.verify, rounds)


def speed_rows(name: str, speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"what": f"read {name}: {how}", "images_per_second": value} for how, value in speeds.items()]


def speed_ratios(prefix: str, speeds: Mapping[str, float], demand: float) -> dict[str, float | None]:
    return {
        f"{prefix}vs_sequential_decode": speeds["training order"] / speeds["sequential"],
        f"{prefix}vs_random_rows": speeds["training order"] / speeds["random rows"],
        f"{prefix}vs_sequential_same_threads": speeds["training order"] / speeds["sequential, threads"],
        f"{prefix}vs_zarr_python": speeds["sequential"] / speeds["sequential, zarr-python"],
        f"{prefix}vs_student_demand": speeds["training order"] / demand,
    }
