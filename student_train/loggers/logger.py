"""A run's log, told to other programs beside ``metrics.jsonl``; one file of this folder is one of them.

A run that was killed goes on from its checkpoint and logs some steps again. What a logger was told is noted in ``loggers.json``
before it is told, so that it gets no step twice, and a logger that was not there before gets what ``metrics.jsonl`` has.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ...common.errors import BRINGS, FailureError, MisuseError
from ...common.files import replacing
from ...common.records import read_record, sealed

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Logger, whose file ``NAME_logger.py`` has an ``open_logger``, and the module that its extra installs."""
NAME = "loggers.json"


class Logger(Protocol):
    """One program. Whatever it raises is noted once, and ends its part in the run, not the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None:
        """``finished``: the run is complete, not stopped."""


@dataclass
class Told:
    """What one logger has been told: the last step of each kind of line. ``key`` is its own name for the run."""

    key: str = ""
    steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """What a logger is opened with: the run's folder, its settings, and, where it was open before, its ``key``."""

    out: Path
    settings: Mapping[str, Any]
    key: str
    is_new: bool


def check_installed(names: Sequence[str]) -> None:
    """MisuseError: a logger's package is missing."""
    for name in names:
        spec = find_spec(NEEDS[name])
        if spec is None or spec.origin is None:  # a folder of that name in the working directory is no package
            raise MisuseError(f"`loggers` {name} is not installed here: {BRINGS.format(name)}")


class Loggers:
    """Those of a run. ``log`` is told every line of its log; ``close`` ends it. With no names it does nothing."""

    def __init__(
        self,
        names: Sequence[str],
        out: Path,
        settings: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
        note: Callable[[str], None],
    ) -> None:
        """``lines`` are those that ``metrics.jsonl`` has already. MisuseError: one of them cannot be opened."""
        self._path, self._note = out / NAME, note
        self._told = _read(self._path) if names else {}
        self._open: dict[str, Logger] = {}
        settings = json.loads(json.dumps(settings, default=str))
        for name in dict.fromkeys(names):
            told = self._told.setdefault(name, Told())
            is_new, told.key = not told.key, told.key or uuid.uuid4().hex
            try:
                logger = import_module(f".{name}_logger", __package__).open_logger(
                    Opening(out, settings, told.key, is_new)
                )
                told.key = getattr(logger, "key", told.key)
            except Exception as problem:
                self.close(finished=False)
                raise MisuseError(f"`loggers` {name} cannot be opened: {_sentence(problem)}") from problem
            self._open[name] = logger
        if names:
            self._write()
        for line in lines:
            self.log(line)

    def log(self, line: Mapping[str, Any], kind: str = "train") -> None:
        """A line of the log, ``step`` among its values; its numbers are told as ``KIND/NAME``."""
        step = line["step"]
        waiting = [name for name in self._open if self._told[name].steps.get(kind, -1) < step]
        if not waiting:
            return
        for name in waiting:
            self._told[name].steps[kind] = step
        self._write()
        values = {f"{kind}/{name}": value for name, value in _numbers(line) if name != "step"}
        for name in waiting:
            self._try(name, lambda logger: logger.log(step, values))

    def close(self, finished: bool) -> None:
        for name in list(self._open):
            self._try(name, lambda logger: logger.close(finished))
        self._open.clear()

    def _try(self, name: str, do: Callable[[Logger], None]) -> None:
        try:
            do(self._open[name])
        except Exception as problem:
            del self._open[name]
            self._note(f"{name} failed and is told no more; metrics.jsonl has everything ({_sentence(problem)})")

    def _write(self) -> None:
        try:
            with replacing(self._path) as file:
                file.write(sealed({"told": {name: asdict(told) for name, told in self._told.items()}}))
        except FailureError as problem:
            self._note(f"the loggers may be told some steps twice after a kill: {problem}")


def _read(path: Path) -> dict[str, Told]:
    """FailureError: it is damaged."""
    if not path.exists():
        return {}
    return read_record(path, Stored, "delete it, and the loggers begin a new run").told


@dataclass(frozen=True)
class Stored:
    """``loggers.json``."""

    told: dict[str, Told]


def _numbers(line: Mapping[str, Any], before: str = "") -> list[tuple[str, float]]:
    """Numbers by name; those of a mapping as ``shares/data``."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{before}{name}", value))
    return found


def _sentence(problem: BaseException) -> str:
    """The first line of what a package says."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no reason given'}"
