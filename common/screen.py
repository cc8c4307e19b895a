"""What the user sees: the console, notes, tables and a progress bar. Under torchrun rank 0 speaks for all."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import ceil
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from .errors import printable
from .options import spelled
from .views.config import LoaderConfig

console = Console(quiet=os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0", markup=False)
"""A name with [brackets] is shown as it is."""

Cell = str | int | float | None


class Update(Protocol):
    """Moves a progress bar: how much is done, of how much, and what to say instead of the rate."""

    def __call__(self, done: int, total: int, text: str | None = None) -> None: ...


def note(text: str) -> None:
    """A line of text, with settings named as options. It is not wrapped: a path is copied whole."""
    lines = map(printable, spelled(text).split("\n"))
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def say(sentence: str) -> None:
    """A sentence without a path or command to copy: on a terminal, lines end between words."""
    console.print(printable(spelled(sentence)), highlight=False, soft_wrap=not console.is_terminal)


def note_slow_loader(config: LoaderConfig) -> None:
    """Say so where ffcv is wanted if it is there, and it is not."""
    from .views.loader import geometry

    if config.backend == "auto" and geometry(config) == "pillow":
        note("ffcv is not installed here: the slower torch loader is used (rob doctor says what brings it)")


def facts(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table of names and values."""
    _print_title(title)
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], named: bool = False) -> None:
    """A table; whole numbers with separators, others with two decimals, texts as they are, None as nothing.

    All stand on the right, but for names in the first column of a ``named`` table.
    """
    _print_title(title)
    table = Table()
    for number, column in enumerate(columns):
        name = number == 0 and named  # whole: student.int8.onnx and student.onnx are not the same
        table.add_column(column, justify="left" if name else "right", no_wrap=name, overflow="fold")
    for row in rows:
        table.add_row(
            *(
                f"{x:,}" if isinstance(x, int) else f"{x:,.2f}" if isinstance(x, float) else x and printable(x)
                for x in row
            )
        )
    console.print(table)


def _print_title(title: str) -> None:
    """Above a table, which would wrap it at its own width."""
    console.print(Text(printable(title), style="table.title"))


@contextmanager
def bar(what: str, unit: str) -> Iterator[Update]:
    """A progress bar, with the rate in ``unit`` a second, the time that has passed and the time left."""
    columns = (
        TextColumn(what),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    progress = Progress(*columns, console=console, expand=True, disable=console.quiet)
    task = progress.add_task(what, start=False, total=None, rate="", left="")
    counted_from = last = (0, 0.0)

    def update(done: int, total: int, text: str | None = None) -> None:
        nonlocal counted_from, last
        now = time.monotonic()
        if not progress.live.is_started:  # until then the spinner says what is waited for
            _waiting.stop()
            progress.start_task(task)
            counted_from = (done, now)
        if done < last[0]:  # another part that begins anew
            counted_from = (done, now)
        last = (done, now)
        passed = now - counted_from[1]
        rate = (done - counted_from[0]) / passed if passed > 0.5 else 0.0
        said = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s" if rate else ""
        left = f"{timedelta(seconds=ceil((total - done) / rate))} left" if rate else ""  # rich's wants two steps for it
        progress.update(task, completed=done, total=total, rate=said if text is None else text, left=left)
        progress.start()

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


class _Waiting:
    """The spinner of ``waiting``, of which there is one at a time."""

    live: Live | None = None

    def start(self, text: str) -> None:
        spinner = Spinner("dots", text)
        if self.live is None:
            self.live = Live(spinner, console=console, transient=True, refresh_per_second=8)
            self.live.start(refresh=True)
        else:
            self.live.update(spinner, refresh=True)

    def stop(self) -> None:
        live, self.live = self.live, None
        if live is not None:
            live.stop()


_waiting = _Waiting()


def say_waiting(text: str) -> None:
    """What is being waited for, beside a spinner on a terminal, until the next ``bar`` or the end of ``waiting``."""
    if console.is_terminal and not console.quiet:
        _waiting.start(text)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner that says so at once, and is gone at the end."""
    say_waiting(text)
    try:
        yield
    finally:
        _waiting.stop()
