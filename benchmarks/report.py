"""The one form in which every benchmark reports: printed as a table, written as JSON."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from rob.common.run import versions

Item = TypeVar("Item")
PACKAGES = ("rob", "torch", "torchvision", "timm", "triton", "ffcv", "zarr", "numcodecs", "numba", "numpy")

DEVIATION = "_deviation"
"""Ending of the column with another one's standard deviation, which is shown behind it."""
WIDEST = 1000
"""Columns that a table in a pipe or a file may take: there no window breaks its cells."""


_shown_by: list[Callable[[int, int], None]] = []


@contextmanager
def shown_by(update: Callable[[int, int], None]) -> Iterator[None]:
    """``update`` is told how many of the ``parts`` of a benchmark are done."""
    _shown_by.append(update)
    try:
        yield
    finally:
        _shown_by.remove(update)


def parts(items: Sequence[Item]) -> Iterator[Item]:
    """The items, such as its rounds, while it is shown how many of them are done."""
    for done, item in enumerate(items):
        for update in _shown_by:
            update(done, len(items))
        yield item
    for update in _shown_by:
        update(len(items), len(items))


@dataclass(frozen=True)
class Report:
    """``work`` is what every side did, ``rows`` one mapping a side or setting, ``ratios`` the figures that count."""

    name: str
    device: str
    work: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    ratios: Mapping[str, float | None]
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        name: str,
        device: torch.device,
        work: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        ratios: Mapping[str, float | None],
    ):
        """A report of this machine and these library versions."""
        return cls(name, device_name(device), work, rows, ratios, versions(*PACKAGES))

    def write(self, path: Path | None = None) -> Path:
        """Write JSON; by default ``benchmarks/results/<name>_<device>_<date>.json`` under the working directory, with a number
        behind it where there is one already: an earlier result is never replaced by that."""
        short = "cpu" if "cpu" in self.device.lower() or "threads" in self.device else self.device.split()[-1].lower()
        if path is None:
            first = Path("benchmarks/results") / f"{self.name}_{short}_{date.today():%Y%m%d}.json"
            others = (first.with_stem(f"{first.stem}-{n}") for n in count(2))
            path = next(name for name in chain([first], others) if not name.exists())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return path

    def show(self, console: Console | None = None) -> None:
        """Print the rows, each run of rows that share columns in a table of its own, and the ratios below."""
        console = console or Console()
        tables: list[list[Mapping[str, Any]]] = []
        for row in self.rows:
            if tables and len(row.keys() & tables[-1][-1].keys()) > 1:
                tables[-1].append(row)
            else:
                tables.append([row])
        for number, rows in enumerate(tables):
            columns = list(dict.fromkeys(key for row in rows for key in row if not key.endswith(DEVIATION)))
            table = Table(title=None if number else f"{self.name} on {self.device}", title_justify="left")
            for column in columns:
                table.add_column(column.replace("_", " "), justify="left" if column == columns[0] else "right")
            for row in rows:
                table.add_row(*(_cell(row, column) for column in columns))
            if not console.is_terminal:
                wide = console.options.update(max_width=WIDEST)
                console.width = max(console.width, console.measure(table, options=wide).maximum)
            console.print(table)
        for name, value in self.ratios.items():
            console.print(f"{name} = {_text(value)}", highlight=False)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the cores that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    except OSError:
        names = {platform.processor() or platform.machine()}
    return f"{', '.join(sorted(names))}, {torch.get_num_threads()} torch threads"


def median_of(work: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median seconds of ``repeats`` calls after ``warmup`` calls that do not count."""
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _cell(row: Mapping[str, Any], column: str) -> str:
    deviation = row.get(column + DEVIATION)
    return _text(row.get(column)) + ("" if deviation is None else f" ±{deviation:.2g}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
