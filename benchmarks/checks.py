"""What checking every file costs: this version against an earlier one, in turns.

    git worktree add /tmp/before 1ba95fc     # the last version that believed what it read
    python benchmarks/checks.py runs/checks --before /tmp/before [--starts 10] [--pairs 10] [--images 100000]

Each side is its own tree in processes of its own, with files that it has packed itself. `start` is a whole command, from Python's
start to the moment at which the first image would be read, on many tiny images; `open` is the packed file alone. `loader` gives
views of photographs (2 of 224 and 6 of 96 px of 500 x 375) on one thread, with the Beton opened anew (every image is looked at
for the first time) and once more with the same. The sides take turns; medians, in seconds of wall and of CPU, which other work
on the machine disturbs less. Figures are kept in OUT: called again, it adds pairs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("before", "now")
TRAINING = (
    "--student",
    "test_resnet",
    "--image-size",
    "32",
    "--batch-size",
    "4096",
    "--epochs",
    "1",
    "--prototypes",
    "16",
)
FAST = ("--loader", "torch", "--workers", "1", "--device", "cpu")
PHOTOGRAPHS = 200


# ==== one side, in its own process ====


def pack_tiny(path: Path, count: int) -> None:
    import numpy as np

    from rob.common.images.beton import RAW, BetonWriter, StoredImage

    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    labels = tuple(row % 10 for row in range(count))
    with BetonWriter(path, count) as writer:
        for row, label in enumerate(labels):
            writer.append(StoredImage(pixels[row].tobytes(), 8, 8, RAW), label)
        writer.finish(
            encoding="raw",
            jpeg_quality=None,
            max_resolution=None,
            paths=tuple(f"{label}/{row:06}.png" for row, label in enumerate(labels)),
            labels=labels,
            classes=tuple(map(str, range(10))),
        )


def pack_photographs(path: Path, folder: Path) -> None:
    from rob.benchmarks.photographs import make_photographs
    from rob.common.images.pack import PackConfig, pack

    if not folder.exists():
        make_photographs(folder, PHOTOGRAPHS)
    pack(PackConfig(str(folder), path))


def start(words: list[str]) -> None:
    """``rob WORDS`` until it would read its first image."""
    from rob.cli import main
    from rob.common.views.loader import ViewLoader

    def reached(self: Any, order: Any, sets: Any) -> None:
        print(json.dumps({"cpu": sum(os.times()[:2])}), flush=True)
        os._exit(0)

    ViewLoader.epoch = reached  # type: ignore[assignment]
    sys.argv = ["rob", *words]
    main()


def open_beton(path: Path) -> None:
    """Once more for every line that comes in."""
    from rob.common.images.beton import Beton

    _answer(lambda: {"open": lambda: Beton(path).num_images})


def loader(path: Path) -> None:
    """Seconds of an epoch, of a Beton opened anew and then of the same, for every line that comes in."""
    import numpy as np

    from rob.benchmarks.loader_peers import SEED, VIEWS
    from rob.common.images.beton import Beton
    from rob.common.views.loader import LoaderConfig, ViewLoader
    from rob.common.views.recipes import RecipeOverrides, get_recipe

    recipe = get_recipe("dino", RecipeOverrides(interpolation="bilinear"))  # of both sides, whose usual filters differ

    def parts() -> dict[str, Callable[[], object]]:
        views = ViewLoader(Beton(path), recipe, SEED, LoaderConfig("ffcv", 16, 1))
        epoch = lambda: [None for _ in views.epoch(np.arange(PHOTOGRAPHS), VIEWS)]  # noqa: E731
        return {"loader, first look": epoch, "loader, later": epoch}

    _answer(parts)


def _answer(parts: Callable[[], dict[str, Callable[[], object]]]) -> None:
    for _ in sys.stdin:
        found = {}
        for name, do in parts().items():
            wall, cpu = time.perf_counter(), time.process_time()
            do()
            found[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


# ==== both, in turns ====


def on_side(tree: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    link = out / "rob"
    out.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(tree)
    environment = {**os.environ, "PYTHONPATH": str(out), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).absolute()), "--as", *words]
    return subprocess.Popen(script, env=environment, cwd=out, text=True, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)


def checks(out: Path, trees: dict[str, Path], images: int, starts: int, pairs: int) -> list[dict[str, Any]]:
    """A row a measurement: medians of both sides, and the ratio of now to before."""
    from rob.benchmarks.kept import keep_settings  # of this version: the others have roles alone

    keep_settings(out, {"before": str(trees["before"]), "images": images})
    kept = out / "figures.jsonl"
    found: dict[str, dict[str, list[dict[str, float]]]] = {}

    def keep(name: str, side: str, figures: dict[str, float]) -> None:
        found.setdefault(name, {}).setdefault(side, []).append(figures)
        with open(kept, "a") as file:
            file.write(json.dumps([name, side, figures]) + "\n")

    for line in kept.read_text().splitlines() if kept.exists() else ():
        name, side, figures = json.loads(line)
        found.setdefault(name, {}).setdefault(side, []).append(figures)
    for side, tree in trees.items():
        folder = out / side
        for name, words in (("tiny", (str(images),)), ("photographs", (str(out / "photographs"),))):
            if not (folder / f"{name}.beton").exists():
                process = on_side(tree, folder, f"pack_{name}", f"{name}.beton", *words)
                if process.wait() != 0:
                    raise RuntimeError(f"{side}: packing {name} failed")
    commands = {
        "start of rob train-student": ("train-student", "tiny.beton", "--targets", "momentum", *TRAINING, *FAST),
        "start of rob eval knn": ("eval", "knn", "pixels", "tiny.beton", *FAST),
    }
    for number in range(starts):
        for name, words in commands.items():
            for side in SIDES if number % 2 else SIDES[::-1]:
                output = ("--out", f"run{time.time_ns()}") if name.endswith("student") else ()
                began = time.perf_counter()
                process = on_side(trees[side], out / side, "start", *words, *output)
                assert process.stdout is not None
                line = next((line for line in process.stdout if line.startswith('{"cpu"')), None)
                if line is None:
                    raise RuntimeError(f"{side}: {name} did not reach its first image")
                told = json.loads(line) | {"wall": time.perf_counter() - began}
                process.wait()
                keep(name, side, told)
    for role, file in (("open_beton", "tiny.beton"), ("loader", "photographs.beton")):
        running = {side: on_side(trees[side], out / side, role, file) for side in SIDES}
        for number in range(pairs + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                process = running[side]
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                told = json.loads(process.stdout.readline())
                for name, figures in told.items() if number else ():  # the first one warms up
                    keep(name, side, figures)
        for process in running.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    rows = []
    for name, sides in found.items():
        if len(sides) < 2:
            continue
        row: dict[str, Any] = {"what": name, "pairs": min(map(len, sides.values()))}
        for kind in ("wall", "cpu"):
            before, now = (median(figures[kind] for figures in sides[side]) for side in SIDES)
            row |= {
                f"before_{kind}_s": round(before, 4),
                f"now_{kind}_s": round(now, 4),
                f"{kind}_ratio": round(now / before, 3),
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        role, *words = sys.argv[2:]
        roles: dict[str, Callable[[], None]] = {
            "pack_tiny": lambda: pack_tiny(Path(words[0]), int(words[1])),
            "pack_photographs": lambda: pack_photographs(Path(words[0]), Path(words[1])),
            "start": lambda: start(words),
            "open_beton": lambda: open_beton(Path(words[0])),
            "loader": lambda: loader(Path(words[0])),
        }
        roles[role]()
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=Path, required=True, help="The tree of the earlier version.")
    parser.add_argument("--starts", type=int, default=10, help="Pairs of starts.")
    parser.add_argument("--pairs", type=int, default=10, help="Pairs of the other measurements.")
    parser.add_argument("--images", type=int, default=100_000)
    given = parser.parse_args()
    trees = {"before": given.before.absolute(), "now": Path(__file__).absolute().parents[1]}
    load = os.getloadavg()[0]
    rows = checks(given.out.absolute(), trees, given.images, given.starts, given.pairs)
    import torch

    from rob.benchmarks.report import Report

    work = {
        "images": given.images,
        "load_at_start": round(load, 1),
        "load_at_end": round(os.getloadavg()[0], 1),
    }
    report = Report.of(
        "checks", torch.device("cpu"), work, rows, {f"{row['what']}, cpu": row["cpu_ratio"] for row in rows}
    )
    report.show()
    print(report.write())
