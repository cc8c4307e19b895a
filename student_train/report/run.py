"""What a report reads of a run's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...common.errors import FailureError, MisuseError
from ...common.records import read_record
from ..checkpoint import WEIGHTS_NAME, hash_student
from ..evaluate.results import of_weights, read_results
from ..evaluate.yardstick import OUTCOME_NAME, Measured, Outcome, recorded
from ..export.card import read_settings
from ..export.exported_file import ExportedFile, read_exports
from ..run_folder import LogLine, read_log


@dataclass(frozen=True)
class Run:
    """One run; whatever it has not is empty or None. ``name`` is short, and no other run of the report has it."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    log: Sequence[LogLine]
    measured: Sequence[Measured]
    outcome: Outcome | None
    results: Mapping[str, Mapping[str, Any]]
    exports: Mapping[str, ExportedFile]
    left_out: Sequence[str]
    """Tasks whose results are of other weights than the student's."""

    @property
    def has_weights(self) -> bool:
        return (self.folder / WEIGHTS_NAME).exists()

    @cached_property
    def objective(self) -> str:
        return str((self.settings.get("objective") or {}).get("name", "unknown"))

    @cached_property
    def student(self) -> str:
        return str((self.settings.get("student") or {}).get("name", "unknown"))

    @property
    def data(self) -> Path | None:
        found = self.settings.get("data")
        return Path(found) if isinstance(found, str) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """MisuseError: no run there, the same one twice, or one of its files is damaged."""
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise MisuseError(f"{folder}: no such folder: give the folder of a run")
        if not (folder / "config.json").exists():
            raise MisuseError(
                f"{folder} has no config.json: give the folder of a run, as rob train-student --out named it"
            )
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise MisuseError(f"{folder} is given twice: give each run once")
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else list(map(str, folders))
    return [_read(name, folder) for name, folder in zip(names, folders, strict=True)]


def _read(name: str, folder: Path) -> Run:
    settings = read_settings(folder)
    if "facts" in settings:
        raise MisuseError(f"{folder} is of rob finetune: a report is of runs of rob train-student")
    try:
        outcome, found, exports = folder / OUTCOME_NAME, read_results(folder), read_exports(folder)
        results = found
        if (folder / WEIGHTS_NAME).exists():
            weights = hash_student(folder)
            results = of_weights(found, weights)
            exports = {file: entry for file, entry in exports.items() if entry.weights == weights}
        return Run(
            name,
            folder,
            settings,
            read_log(folder),
            _measured(folder),
            read_record(outcome, Outcome, "delete it") if outcome.exists() else None,
            results,
            exports,
            [task for task in found if task not in results],
        )
    except FailureError as problem:
        raise MisuseError(str(problem)) from None


def _measured(folder: Path) -> list[Measured]:
    """A step that was measured again, after a kill, counts as it was last."""
    found = {one.step: one for one in recorded(folder)}
    return [found[step] for step in sorted(found)]
