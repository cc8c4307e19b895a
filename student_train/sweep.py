"""A grid of training runs over any options: one process a run, one run after another or one a GPU.

Each cell of the grid is a run folder of its own, made by the same commands that a user would type. What is finished is not
done again, and what was killed goes on where it stopped, because the commands do.
"""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from ..common.errors import FailureError, MisuseError
from .checkpoint import WEIGHTS_NAME, replacing
from .evaluate.results import read_results

MOST_RUNS = 400
"""Of one sweep: more is a slip of the keyboard."""


@dataclass(frozen=True)
class Variation:
    """An option of ``rob train-student`` and the values to try; a value may be several words (``0.05 0.3``)."""

    option: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Variation":
        """``local-size=16,24`` or ``local-scale=0.05 0.14,0.05 0.3``. MisuseError: it is not of that form."""
        option, _, listed = text.partition("=")
        option, values = option.strip().removeprefix("--"), tuple(value.strip() for value in listed.split(","))
        if not option or not all(values):
            raise MisuseError(f"--vary {text!r} is not OPTION=VALUE,VALUE: for example --vary local-size=16,24")
        if len(set(values)) < len(values):
            raise MisuseError(f"--vary {text!r} names a value twice: leave one out")
        if option in ("out", "targets-out"):
            raise MisuseError(f"--vary {text!r}: every run of a sweep has a folder of its own already")
        return cls(option, values)


@dataclass(frozen=True)
class SweepConfig:
    """``arguments`` are those that every ``rob train-student`` gets, the data first; ``test`` None tests as ``rob eval knn``
    does without one."""

    out: Path
    arguments: tuple[str, ...]
    variations: tuple[Variation, ...]
    test: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.variations:
            raise MisuseError("nothing to sweep over: give at least one --vary OPTION=VALUE,VALUE")
        options = [variation.option for variation in self.variations]
        for option in options:
            if options.count(option) > 1:
                raise MisuseError(f"--vary {option} is given twice: list all its values in one")
            if f"--{option}" in self.arguments:
                raise MisuseError(f"--{option} is both varied and fixed: leave one of them out")
        if "--out" in self.arguments:
            raise MisuseError("--out belongs to the sweep: leave it out of the options of train-student")
        if not self.arguments or self.arguments[0].startswith("-"):
            raise MisuseError("after -- come the arguments of rob train-student, first of all DATA.beton")
        runs = len(self.cells())
        if runs > MOST_RUNS:
            raise MisuseError(f"this grid has {runs} runs, expected at most {MOST_RUNS}: vary fewer options or values")

    def cells(self) -> list[tuple[str, ...]]:
        """Every combination of values, one value a variation; the last one changes fastest."""
        return list(product(*(variation.values for variation in self.variations)))

    def folder(self, cell: Sequence[str]) -> Path:
        """The run folder of a cell: ``local-size=16,momentum=0.99``."""
        named = zip(self.variations, cell, strict=True)
        return self.out / ",".join(f"{v.option}={value.replace(' ', '_').replace('/', '_')}" for v, value in named)

    def commands(self, cell: Sequence[str]) -> list[list[str]]:
        """Train, then measure."""
        rob, folder = [sys.executable, "-m", "rob"], str(self.folder(cell))
        varied = [
            word for v, value in zip(self.variations, cell, strict=True) for word in (f"--{v.option}", *value.split())
        ]
        device = [] if "--device" in self.arguments else ["--device", self.device]
        test = [] if self.test is None else ["--test", str(self.test)]
        return [
            [*rob, "train-student", *self.arguments, *varied, "--out", folder, *device],
            [*rob, "eval", "knn", folder, self.arguments[0], *test, "--device", self.device],
        ]


@dataclass(frozen=True)
class SweepRow:
    """One run: its values in the order of the variations, its last loss, and its k-NN top-1 in percent."""

    values: tuple[str, ...]
    loss: float
    knn_top1: float


def sweep(
    config: SweepConfig, progress: Callable[[int, int, str], None] = lambda done, total, text: None
) -> list[SweepRow]:
    """Run what is not finished yet, and read every result. ``progress`` gets (runs done, all, the latest one).

    Writes ``sweep.json`` into ``config.out``. FailureError: runs failed, after all others were made; it names their logs.
    """
    cells = config.cells()
    config.out.mkdir(parents=True, exist_ok=True)
    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    gpus = torch.cuda.device_count() if config.device == "auto" else 0
    for gpu in [str(number) for number in range(gpus)] or [None]:
        places.put(gpu)
    done = 0

    def one(cell: tuple[str, ...]) -> bool:
        nonlocal done
        gpu = places.get()
        try:
            succeeded = is_finished(config.folder(cell)) or _run(config, cell, gpu)
        finally:
            places.put(gpu)
        done += 1
        progress(done, len(cells), config.folder(cell).name)
        return succeeded

    with ThreadPoolExecutor(max(1, gpus)) as pool:
        succeeded = list(pool.map(one, cells))
    rows = [read_row(config, cell) for cell, ok in zip(cells, succeeded, strict=True) if ok]
    named = [dict(zip((v.option for v in config.variations), row.values, strict=True)) for row in rows]
    results = [names | {"loss": row.loss, "knn_top1": row.knn_top1} for names, row in zip(named, rows, strict=True)]
    with replacing(config.out / "sweep.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    failed = [config.folder(cell) / "sweep.log" for cell, ok in zip(cells, succeeded, strict=True) if not ok]
    if failed:
        raise FailureError(f"{len(failed)} of {len(cells)} runs failed, see {', '.join(map(str, failed[:3]))}")
    return rows


def is_finished(folder: Path) -> bool:
    """Whether both commands have run to their end."""
    return (folder / WEIGHTS_NAME).exists() and (folder / "eval" / "knn.json").exists()


def _run(config: SweepConfig, cell: Sequence[str], gpu: str | None) -> bool:
    folder = config.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with open(folder / "sweep.log", "w") as log:
        for command in config.commands(cell):
            log.write(" ".join(command) + "\n")
            log.flush()
            if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
                return False
    return True


def read_row(config: SweepConfig, cell: tuple[str, ...]) -> SweepRow:
    """What a finished run came to."""
    folder = config.folder(cell)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return SweepRow(cell, last["loss"], read_results(folder)["knn"]["top1"])


def draw_heat_map(config: SweepConfig, rows: Sequence[SweepRow], out: Path) -> None:
    """k-NN top-1 as a PNG: the first variation down, the second across (one row of cells if there is none), and of further
    ones the best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down, across = config.variations[0], (config.variations[1] if len(config.variations) > 1 else Variation("", ("",)))
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        place = row.values[0], row.values[1] if len(config.variations) > 1 else ""
        best[place] = max(row.knn_top1, best.get(place, row.knn_top1))
    grid = [[best.get((i, j), float("nan")) for j in across.values] for i in down.values]
    figure = Figure((1.6 + 1.1 * len(across.values), 1.3 + 0.6 * len(down.values)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, high = min(best.values()), max(best.values())
    axes.imshow(grid, cmap="Blues", vmin=low - 0.5 * (high - low) - 0.1, vmax=high + 0.1, aspect="auto")
    for i, j in product(range(len(down.values)), range(len(across.values))):
        if (down.values[i], across.values[j]) in best:
            bright = grid[i][j] > low + 0.6 * (high - low)
            axes.text(j, i, f"{grid[i][j]:.1f}", ha="center", va="center", color="white" if bright else "black")
    axes.set_xticks(range(len(across.values)), across.values)
    axes.set_yticks(range(len(down.values)), down.values)
    axes.set(xlabel=across.option, ylabel=down.option, title="k-NN top-1, %")
    with replacing(out) as file:
        figure.savefig(file, format="png", dpi=140)
