"""A grid of training runs over any options: one process a run, one run after another or one a GPU.

Each cell of the grid is a run folder of its own, made by the same commands that a user would type. What is finished is not
done again, and what was killed goes on where it stopped, because the commands do. A finished run's ``sweep.json`` says what it
was made with: another sweep does not take its result for its own.
"""

import io
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from ..common.errors import FailureError, MisuseError
from ..common.factories import is_factory
from ..common.files import first_difference, new_file, replacing, wait_for_lock
from ..common.images.beton import Beton
from ..common.records import read_record, sealed
from ..common.signals import PARENT
from ..common.store.reader import TargetStore
from .evaluate.features import labels_of
from .evaluate.results import read_results
from .run_folder import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_RUNS = 400
"""Of one sweep: more is a slip of the keyboard."""

RECORD_NAME = "sweep.json"
"""In a finished run's folder: its result and what it was made with. In the sweep's own: all results."""


LAST_STEP_SECONDS = 60.0
"""How long a run whose sweep was killed may take to save and end."""


class Record(TypedDict):
    """What is read back of a finished run's ``sweep.json``."""

    made_with: dict[str, Any]
    loss: float
    knn_top1: float


class Flag(NamedTuple):
    """An option that takes no value: what is typed for yes, and what for no (None: it is left out)."""

    yes: str
    no: str | None


YES_OR_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


@dataclass(frozen=True)
class Variation:
    """An option of ``rob train-student`` and the values to try; a value may be several words (``0.05 0.3``), that of a
    ``flag`` is yes or no."""

    option: str
    values: tuple[str, ...]
    flag: Flag | None = None

    @classmethod
    def parse(cls, text: str, flags: Mapping[str, Flag] | None = None) -> "Variation":
        """``local-size=16,24`` or ``local-scale=0.05 0.14,0.05 0.3``, and for an option among ``flags`` ``head-norm=yes,no``.

        MisuseError: it is not of that form.
        """
        option, _, listed = text.partition("=")
        option, values = option.strip().removeprefix("--"), tuple(value.strip() for value in listed.split(","))
        if not option or not all(values):
            raise MisuseError(f"--vary {text!r} is not OPTION=VALUE,VALUE: for example --vary local-size=16,24")
        flag = (flags or {}).get(option)
        if flag:
            unknown = [value for value in values if value.lower() not in YES_OR_NO]
            if unknown:
                raise MisuseError(f"--vary {text!r}: --{option} is a flag, {unknown[0]!r} is neither yes nor no")
            values = tuple(YES_OR_NO[value.lower()] for value in values)
        if len(set(values)) < len(values):
            raise MisuseError(f"--vary {text!r} names a value twice: leave one out")
        if option == "out":
            raise MisuseError(f"--vary {text!r}: every run of a sweep has a folder of its own already")
        return cls(option, values, flag)

    @property
    def names(self) -> tuple[str, ...]:
        """What sets the option: its name, and for a flag the one for no too."""
        return (self.option,) if self.flag is None else tuple(word.removeprefix("--") for word in self.flag if word)

    def words(self, value: str) -> list[str]:
        """What is typed for ``value``: ``--local-scale 0.05 0.3``, ``--no-head-norm``, or nothing."""
        if self.flag is None:
            return [f"--{self.option}", *value.split()]
        word = self.flag.yes if value == "yes" else self.flag.no
        return [] if word is None else [word]


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
        names = [name for variation in self.variations for name in variation.names]
        for name in names:
            if names.count(name) > 1:
                raise MisuseError(f"--vary {name} is given twice: list all its values in one")
            if self.fixes(name):
                raise MisuseError(f"--{name} is both varied and fixed: leave one of them out")
        if self.fixes("out"):
            raise MisuseError("--out belongs to the sweep: leave it out of the options of train-student")
        if self.fixes("plan-only") or "plan-only" in names:
            raise MisuseError("--plan-only trains nothing, and a sweep measures what was trained: leave it out")
        if self.fixes("device") or "device" in names:
            raise MisuseError("--device belongs to the sweep, whose k-NN uses it too: give it before the --")
        if not self.arguments or self.arguments[0].startswith("-"):
            raise MisuseError("after -- come the arguments of rob train-student, first of all DATA.beton")
        runs = len(self.cells())
        if runs > MOST_RUNS:
            raise MisuseError(f"this grid has {runs} runs, expected at most {MOST_RUNS}: vary fewer options or values")

    def fixes(self, option: str) -> bool:
        """Whether every run gets ``--option``, ``--option VALUE`` or ``--option=VALUE``."""
        return any(word.split("=")[0] == f"--{option}" for word in self.arguments)

    def cells(self) -> list[tuple[str, ...]]:
        """Every combination of values, one value a variation; the last one changes fastest."""
        return list(product(*(variation.values for variation in self.variations)))

    def folder(self, cell: Sequence[str]) -> Path:
        """The run folder of a cell: ``local-size=16,momentum=0.99``."""
        named = zip(self.variations, cell, strict=True)
        return self.out / ",".join(f"{v.option}={value.replace(' ', '_').replace('/', '_')}" for v, value in named)

    def varied(self, cell: Sequence[str]) -> list[str]:
        """The cell's options as words: ``--local-size 16 --local-scale 0.05 0.14``."""
        options = zip(self.variations, cell, strict=True)
        return [word for variation, value in options for word in variation.words(value)]

    def stores(self, cell: Sequence[str]) -> list[Path]:
        """The target stores that a cell trains from; none with ``online`` and ``momentum``."""
        words = [*self.arguments, *self.varied(cell)]
        given = [word.removeprefix("--targets=") for word in words if word.startswith("--targets=")]
        given += [value for word, value in pairwise(words) if word == "--targets"]
        return [Path(store) for store in given if store not in ("online", "momentum")]

    def made_with(self, cell: Sequence[str]) -> dict[str, Any]:
        """What the cell's result depends on: options, images and targets, not where these lie or how fast it runs.
        MisuseError: a file or store is not there."""
        manifests = [TargetStore.open(store).manifest.to_json() for store in self.stores(cell)]
        told = [{name: value for name, value in manifest.items() if name != "versions"} for manifest in manifests]
        of_a_store = ("--targets",) if manifests else ()
        return {
            "train_student": _without([*self.arguments[1:], *self.varied(cell)], ("--workers", *of_a_store)),
            "targets": told if len(told) > 1 else told[0] if told else {},
            "images": Beton(self.arguments[0]).manifest.fingerprint,
            "test": None if self.test is None else Beton(self.test).manifest.fingerprint,
            "labels": [Beton(data).labels_hash for data in (self.arguments[0], self.test) if data is not None],
        }

    def commands(self, cell: Sequence[str]) -> list[list[str]]:
        """Train, then measure."""
        rob, folder = [sys.executable, "-m", "rob"], str(self.folder(cell))
        device = ["--device", self.device]
        test = [] if self.test is None else ["--test", str(self.test)]
        return [
            [*rob, "train-student", *self.arguments, *self.varied(cell), "--out", folder, *device],
            [*rob, "eval", "knn", folder, self.arguments[0], *test, *self.own_student(cell), *device],
        ]

    def own_student(self, cell: Sequence[str]) -> list[str]:
        """What names a network of the user's own code once more: nothing is imported because a run names it."""
        words = [*self.arguments, *self.varied(cell)]
        given = [word.removeprefix("--student=") for word in words if word.startswith("--student=")]
        given += [value for word, value in pairwise(words) if word == "--student"]
        return ["--student", given[-1]] if given and is_factory(given[-1]) else []


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

    Writes ``sweep.json`` into ``config.out``. Interrupted, it has the runs save what they have, and waits for them. MisuseError,
    before any run: an image file or a target store is missing, an image has no label, or a run's folder has the result of
    another sweep. FailureError: runs failed, after all others were made; it names their logs.
    """
    cells = config.cells()
    finished = {cell: is_finished(config, cell) for cell in cells}
    for labelled in (Path(config.arguments[0]), config.test):
        if labelled is not None:
            labels_of(Beton(labelled))  # said now, and not once a run has been trained for its k-NN
    config.out.mkdir(parents=True, exist_ok=True)
    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    gpus = visible_gpus() if config.device == "auto" else []
    for gpu in gpus or [None]:
        places.put(gpu)
    processes, counting, done = Processes(), Lock(), 0

    def one(cell: tuple[str, ...]) -> bool:
        nonlocal done
        gpu = places.get()
        try:
            succeeded = finished[cell] or _run(config, cell, gpu, processes)
        finally:
            places.put(gpu)
        with counting:  # cells end in several threads
            done += 1
            progress(done, len(cells), config.folder(cell).name)
        return succeeded

    with ThreadPoolExecutor(max(1, len(gpus))) as pool:
        try:
            succeeded = list(pool.map(one, cells))
        except KeyboardInterrupt:  # runs that have not begun are cancelled
            processes.stop(signal.SIGTERM)
            try:
                pool.shutdown()
            except KeyboardInterrupt:  # asked twice
                processes.stop(signal.SIGKILL)
            raise
    rows = [read_row(config, cell) for cell, ok in zip(cells, succeeded, strict=True) if ok]
    named = [dict(zip((v.option for v in config.variations), row.values, strict=True)) for row in rows]
    results = [names | {"loss": row.loss, "knn_top1": row.knn_top1} for names, row in zip(named, rows, strict=True)]
    with replacing(config.out / "sweep.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    failed = [config.folder(cell) / "sweep.log" for cell, ok in zip(cells, succeeded, strict=True) if not ok]
    if failed:
        *_, last = ["it says nothing", *failed[0].read_text(errors="replace").split("\n")[:-1]]
        raise FailureError(
            f"{len(failed)} of {len(cells)} runs failed, see {', '.join(map(str, failed[:3]))} (the first ends with: {last}); "
            f"the results of the others are in {config.out / 'sweep.json'}"
        )
    return rows


def is_finished(config: SweepConfig, cell: Sequence[str]) -> bool:
    """Whether the cell has its result. MisuseError: as ``made_with``, and where its folder has one of something else."""
    folder, wanted = config.folder(cell), config.made_with(cell)
    if not (folder / RECORD_NAME).exists():
        return False  # train-student goes on with what is there, or refuses it
    try:
        made = read_record(folder / RECORD_NAME, Record, "")["made_with"]
    except (OSError, FailureError):
        return False  # damaged: its commands find that they are done, and it is written again
    different = first_difference(made, wanted)
    if different:
        name, was, now = different
        raise MisuseError(
            f"{folder} has the result of another sweep, with {name} = {_words(was)}, and this one has {_words(now)}: give "
            "another OUT, or delete that folder"
        )
    return True


def _without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """``words`` but for ``options``, each with its value."""
    before = ["", *words]
    return [
        word
        for previous, word in pairwise(before)
        if previous not in options and word not in options and word.partition("=")[0] not in options
    ]


def visible_gpus() -> list[str]:
    """What to set ``CUDA_VISIBLE_DEVICES`` to for one GPU each: of those that are visible here, by their own names."""
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [name.strip() for name in names[: len(numbers)]] if names != [""] else numbers


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Processes:
    """The processes of a sweep, out of reach of the terminal: ``stop`` alone ends them, so that each saves once."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopped = False

    def run(self, words: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> bool:
        """Whether the command ended well."""
        environment = {**environment, PARENT: str(os.getpid())}  # killed, this process takes its runs with it
        with subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True) as process:
            self.running.append(process)
            if self.stopped:  # between the two lines before
                process.terminate()
            process.wait()
            self.running.remove(process)
        return process.returncode == 0 and not self.stopped

    def stop(self, number: int) -> None:
        self.stopped = True
        for process in list(self.running):
            process.send_signal(number)


def _run(config: SweepConfig, cell: Sequence[str], gpu: str | None, processes: Processes) -> bool:
    folder, made_with = config.folder(cell), config.made_with(cell)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    wait_for_lock(folder / ".lock", LAST_STEP_SECONDS)
    with io.TextIOWrapper(new_file(folder / "sweep.log")) as log:
        for words in config.commands(cell):
            log.write(" ".join(words) + "\n")
            log.flush()
            if not processes.run(words, log, environment):
                return False
    lines, results = read_log(folder), read_results(folder)
    if not lines or "knn" not in results:
        raise FailureError(f"{folder} was moved or deleted while its run went on: run the sweep again")
    result = {"loss": lines[-1]["loss"], "knn_top1": results["knn"]["top1"]}
    with replacing(folder / RECORD_NAME) as file:
        file.write(sealed({"made_with": made_with, **result}, indent=2))
    return True


def read_row(config: SweepConfig, cell: tuple[str, ...]) -> SweepRow:
    """What a finished run came to."""
    result = read_record(config.folder(cell) / RECORD_NAME, Record, "run the sweep again")
    return SweepRow(cell, result["loss"], result["knn_top1"])


def draw_heat_map(config: SweepConfig, rows: Sequence[SweepRow], out: Path) -> None:
    """``heat_map`` as a PNG."""
    with replacing(out) as file:
        heat_map(config, rows).savefig(file, format="png")


def heat_map(config: SweepConfig, rows: Sequence[SweepRow]) -> "Figure":
    """k-NN top-1: the first variation down, the second across (one column of cells if there is none), and of further ones the
    best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down, across = config.variations[0], (config.variations[1] if len(config.variations) > 1 else Variation("", ("",)))
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        place = row.values[0], row.values[1] if len(config.variations) > 1 else ""
        best[place] = max(row.knn_top1, best.get(place, row.knn_top1))
    grid = [[best.get((i, j), float("nan")) for j in across.values] for i in down.values]
    figure = Figure((1.6 + 1.1 * len(across.values), 1.3 + 0.6 * len(down.values)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, high = min(best.values()), max(best.values())
    axes.imshow(grid, cmap="Blues", vmin=low - 0.5 * (high - low) - 0.1, vmax=high + 0.1, aspect="auto")
    for i, j in product(range(len(down.values)), range(len(across.values))):
        if (down.values[i], across.values[j]) in best:
            dark = grid[i][j] > low + 0.4 * (high - low)
            axes.text(j, i, f"{grid[i][j]:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(across.values)), across.values)
    axes.set_yticks(range(len(down.values)), down.values)
    axes.set(xlabel=across.option, ylabel=down.option, title="k-NN top-1, %")
    return figure
