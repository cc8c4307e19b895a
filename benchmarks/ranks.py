"""Stage 1 by one process and by the ranks of torchrun on the same cores: does sharing cost anything, and are the bytes the same?

    python -m rob.benchmarks.ranks [--images 8192] [--ranks 2] [--rounds 3] [--teacher NAME] [--view-size 96]

Photographs of 500 x 375 px, a teacher with random weights (the work is the same), one view as int8. Each round caches once by
each side, in turn, in new processes. Counted is from the plan, behind imports, weights and a trial batch, to the whole store, by
the clock of rank 0; whole commands are beside it. A shard, of 4,096 images, is what is shared: give a few for each rank.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

DISTINCT = 64
"""Photographs, over and over."""


def pack_over_and_over(folder: Path, count: int) -> Path:
    """Packed photographs."""
    from PIL import Image

    from rob.benchmarks.photographs import HEIGHT, WIDTH, make_photographs
    from rob.common.images.beton import JPEG, BetonWriter, StoredImage

    make_photographs(folder / "photographs", DISTINCT)
    files = [file.read_bytes() for file in sorted((folder / "photographs").iterdir())]
    assert Image.open(io.BytesIO(files[0])).size == (WIDTH, HEIGHT)
    with BetonWriter(folder / "data.beton", count) as writer:
        for row in range(count):
            writer.append(StoredImage(files[row % DISTINCT], HEIGHT, WIDTH, JPEG), 0)
        paths = tuple(f"0/{row:06}.jpg" for row in range(count))
        writer.finish(
            encoding="jpeg", jpeg_quality=90, max_resolution=None, paths=paths, labels=(0,) * count, classes=("0",)
        )
    return folder / "data.beton"


def cache(asked: argparse.Namespace) -> None:
    """One command, in its own process: the seconds from its plan to its end, by rank 0, into ``asked.cache``.json."""
    import rob
    from rob.common.store.encodings import Encoding
    from rob.teacher_cache.cache import CacheProgress

    began: list[float] = []
    config = rob.CacheConfig(
        asked.data, asked.cache, rob.TeacherConfig(asked.teacher, asked.data.with_name("teacher.safetensors")), views=1,
        encoding=Encoding("embedding", "int8"), view_size=asked.view_size, device="cpu",
    )  # fmt: skip
    rob.cache_teacher(config, CacheProgress(plan=lambda plan: began.append(time.perf_counter())))
    if os.environ.get("RANK", "0") == "0":
        asked.cache.with_suffix(".json").write_text(json.dumps(time.perf_counter() - began[0]))


def timed(data: Path, out: Path, ranks: int, asked: argparse.Namespace) -> dict[str, float]:
    """Seconds of caching, and of the whole command, with what starts it."""
    shutil.rmtree(out, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = ["--teacher", asked.teacher, "--view-size", str(asked.view_size)]
    words = [*launcher, "-m", "rob.benchmarks.ranks", "--cache", str(out), "--data", str(data), *options]
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, env=_environment(ranks), stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    return {"seconds": json.loads(out.with_suffix(".json").read_text()), "whole": whole}


def _environment(ranks: int) -> dict[str, str]:
    """Threads as a user has them: all cores by one process, a share of them by each rank."""
    cores = len(os.sched_getaffinity(0))
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // ranks))}


def differing(one: Path, other: Path) -> int:
    """Files of two stores that are not the same."""
    names = {str(file.relative_to(root)) for root in (one, other) for file in root.rglob("*") if file.is_file()}
    both = ([root / name for root in (one, other)] for name in sorted(names))
    return sum(not (a.exists() and b.exists() and a.read_bytes() == b.read_bytes()) for a, b in both)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teacher", default="efficientnet_lite0", help="any of timm's")
    parser.add_argument("--view-size", type=int, default=96)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.cache is not None:
        cache(asked)
        return

    import timm
    import torch
    from safetensors.torch import save_file

    from rob.benchmarks.report import Report

    found: dict[int, list[dict[str, float]]] = {1: [], asked.ranks: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = pack_over_and_over(folder, asked.images)
        torch.manual_seed(0)
        save_file(timm.create_model(asked.teacher, num_classes=0).state_dict(), folder / "teacher.safetensors")
        for turn in range(asked.rounds):
            for ranks in found if turn % 2 == 0 else reversed(found):
                found[ranks].append(timed(data, folder / f"{ranks}.zarr", ranks, asked))
        differ = differing(folder / "1.zarr", folder / f"{asked.ranks}.zarr")
    rows: list[dict[str, Any]] = [
        {
            "by": "one process" if ranks == 1 else f"{ranks} ranks",
            "images_per_second": asked.images / median(turn["seconds"] for turn in turns),
            "whole_command_seconds": median(turn["whole"] for turn in turns),
            "seconds": [round(turn["seconds"], 2) for turn in turns],
        }
        for ranks, turns in found.items()
    ]
    pairs = zip(found[1], found[asked.ranks], strict=True)
    ratios = {
        "ranks_of_one": median(one["seconds"] / many["seconds"] for one, many in pairs),
        "files_that_differ": float(differ),
    }
    work = {
        "images": asked.images,
        "teacher": asked.teacher,
        "view_size": asked.view_size,
        "rounds": asked.rounds,
        "ranks": asked.ranks,
        "photographs": DISTINCT,
        "cores": len(os.sched_getaffinity(0)),
    }
    report = Report.of("ranks", torch.device("cpu"), work, rows, ratios)
    report.show()
    print(report.write())


if __name__ == "__main__":
    main()
