"""Stage 1 on 8 to 512 GPUs, simulated: how long a data set takes, where more GPUs stop helping, and which resource ends first.

    python -m rob.benchmarks.scaling [--images 1281167 100000000] [--views 4] [--cores 14] [--read 40] [--write 10]

Nothing here was run on several GPUs. What one image costs in each stage is what the kept results measured, each stage by
itself (the source is beside each number); the machine and its file system are stated, and options. Each worker takes whole
shards, in turn, then those that nobody has begun, as ``teacher_cache/share.py`` does. Stages of a worker run side by side,
so its slowest sets its speed; the file system is shared by all. The rows "as measured" take the speed of the whole of stage
1 on the one GPU that it ran on instead, where the host was what ended first.
"""

import argparse
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from rob.benchmarks.report import Report
from rob.common.store.manifest import CHUNK_ROWS, SHARD_CHUNKS

GPUS = (8, 16, 32, 64, 128, 256, 512)
SHARD_ROWS = CHUNK_ROWS * SHARD_CHUNKS
SATURATED = 0.8
"""Of the speed that so many times the workers of the first row would have: less is no longer worth its GPUs."""


@dataclass(frozen=True)
class Costs:
    """Of one worker. Rates in views a second of one GPU, or images a second of one core."""

    name: str
    teacher: float
    """Views/s."""
    decode: float = 1e3 / 0.4505
    """Images/s a core: loader_cpu_20261121, decode only, planes (photographs of 500 x 375 px)."""
    encode: float = 0.68e6
    """Views/s a core: store_cpu_20261127, embedding int8, blosc zstd 3."""
    image_bytes: float = 110e3
    """Of a JPEG: ImageNet's mean."""
    view_bytes: float = 200.0
    """Of a view in the store: store_cpu_20261127, int8 of 256 numbers."""
    start: float = 30.0
    """Seconds until the first batch: imports, compiled views, the teacher's file."""


@dataclass(frozen=True)
class Machines:
    """What the workers run on: ``cores`` a GPU, and a file system for all, in bytes/s, with ``file`` seconds to write a file."""

    cores: float = 14.0
    read: float = 40e9
    write: float = 10e9
    file: float = 0.02


WORKERS = (
    Costs("ViT-S/16, 224 px, H200", teacher=18_914),  # gpu_check_nvidia_h200_20261126, the bare teacher, bf16
    Costs("ViT-L/16, 224 px, H200", teacher=3_084),
    Costs("ViT-S/16, as measured", teacher=12_328),  # gpu_check_nvidia_h200_20261127, of all stages together, 16 cores
    Costs("ViT-L/16, as measured", teacher=2_819),  # both with 65,536 prototypes
)


def capacities(costs: Costs, machines: Machines, views: int, workers: int) -> dict[str, float]:
    """Images/s that each resource allows one of so many workers."""
    per_shard = SHARD_CHUNKS + 3  # a journal a chunk, two arrays, the statistics
    of_cores = 1 / (1 / costs.decode + views / costs.encode)
    return {
        "GPU": costs.teacher / views,
        "cores": machines.cores * of_cores,
        "reading": machines.read / workers / costs.image_bytes,
        "writing": machines.write / workers / (views * costs.view_bytes) / 2,  # the journal, and the shard
        "file latency": SHARD_ROWS / (per_shard * machines.file),
    }


def simulate(costs: Costs, machines: Machines, images: int, views: int, workers: int) -> tuple[float, str]:
    """Seconds until the store is whole, and what ended first."""
    allowed = capacities(costs, machines, views, workers)
    limit = min(allowed, key=lambda name: allowed[name])
    shards = [min(SHARD_ROWS, images - first) for first in range(0, images, SHARD_ROWS)]
    free = [costs.start] * workers
    heapq.heapify(free)
    for rows in shards:  # whoever is free first takes the next: own shards in turn, then those that nobody has begun
        heapq.heapreplace(free, free[0] + rows / allowed[limit])
    finish = len(shards) * machines.file / 10  # sums are read in shard order by one worker
    seconds = max(free) + finish
    ideal = images / allowed[limit] / workers
    if ideal < (seconds - ideal):
        limit = "shards" if len(shards) < 4 * workers else "start and finish"
    return seconds, limit


def needs(costs: Costs, views: int) -> dict[str, Any]:
    """What a GPU has to be given so that it never waits."""
    images = costs.teacher / views
    return {
        "worker": costs.name,
        "images_per_second_a_GPU": images,
        "cores_a_GPU": images * (1 / costs.decode + views / costs.encode),
        "MB_per_second_read": images * costs.image_bytes / 1e6,
        "MB_per_second_written": 2 * images * views * costs.view_bytes / 1e6,
    }


def rows(machines: Machines, images: int, views: int) -> Iterator[dict[str, Any]]:
    for costs in WORKERS:
        first = None
        for workers in GPUS:
            seconds, limit = simulate(costs, machines, images, views, workers)
            speed = images / seconds
            first = first or speed / workers
            share = speed / workers / first
            yield {
                "worker": costs.name,
                "images": images,
                "GPUs": workers,
                "minutes": seconds / 60,
                "images_per_second": speed,
                "share_of_linear": share,
                "ends_first": limit,
                "worth_it": "yes" if share >= SATURATED else "no",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, nargs="+", default=[1_281_167, 100_000_000])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--cores", type=float, default=Machines.cores, help="a GPU")
    parser.add_argument("--read", type=float, default=Machines.read / 1e9, help="GB/s of the file system, for all")
    parser.add_argument("--write", type=float, default=Machines.write / 1e9, help="GB/s of the file system, for all")
    asked = parser.parse_args()
    machines = replace(Machines(), cores=asked.cores, read=asked.read * 1e9, write=asked.write * 1e9)
    found = [needs(costs, asked.views) for costs in WORKERS]
    found += [row for images in asked.images for row in rows(machines, images, asked.views)]
    work = {"images": asked.images, "views": asked.views, "shard_rows": SHARD_ROWS, "machines": vars(machines)}
    Report("scaling", "no device: simulated", work, found, {}, {}).show(Console())


if __name__ == "__main__":
    main()
