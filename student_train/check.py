"""Is everything as it was written? Every checksum of packed images, target stores and run folders, looked at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import FailureError, MisuseError
from ..common.images.beton import Beton
from ..common.places import place_of, shown
from ..common.records import DamagedError, read_record
from ..common.store.reader import TargetStore
from ..common.weights import read_tensor_file
from .checkpoint import is_whole_archive
from .evaluate.yardstick import OUTCOME_NAME
from .export.exported_file import NAME as EXPORTED
from .export.onnx_file import check_onnx
from .loggers.logger import NAME as LOGGERS
from .run_folder import EpochLine, read_lines
from .sweep import RECORD_NAME

Progress = Callable[[int, int], None]
"""Gets (parts looked at, all parts) of the path at hand."""
WRITTEN_BY_OTHERS = ("*.mlpackage", "wandb")
"""Folders in a run's whose files have no checksum of ours."""
RECORDS = ("config.json", "result.json", OUTCOME_NAME, EXPORTED, LOGGERS, RECORD_NAME)


@dataclass(frozen=True)
class Checked:
    """What was found at a path: how many parts there are of which kind, and a sentence for each damaged one."""

    parts: str
    damaged: tuple[str, ...]


def check(path: Path, progress: Progress = lambda done, total: None) -> Checked:
    """Look at a ``.beton``, a target store, a run folder, or a folder of those (a sweep).

    MisuseError: there is nothing of ours at ``path``, or what is there cannot even be opened.
    """
    if is_packed(path):
        data = Beton(path)
        damaged = data.damaged(progress)
        return Checked(f"{data.num_images:,} images", tuple(f"{path}: image {i} is damaged" for i in damaged))
    if place_of(path).exists("zarr.json"):
        return _store(path, progress)
    files = dict(_files_of_runs(path))
    if not files:
        raise MisuseError(f"{shown(path)}: neither packed images, nor a target store, nor a run folder of this machine")
    damaged = []
    for number, (file, problem_of) in enumerate(files.items(), 1):
        if problem := problem_of(file):
            damaged.append(problem)
        progress(number, len(files))
    return Checked(f"{len(files)} files", tuple(damaged))


def is_packed(path: Path) -> bool:
    """Whether it is, or would be, packed images."""
    return path.suffix == ".beton" or (path.is_file() and path.suffix not in (".safetensors", ".onnx", ".pt"))


def _store(path: Path, progress: Progress) -> Checked:
    store = TargetStore.open(path)
    return Checked(f"{store.manifest.num_chunks:,} chunks", tuple(store.verify(progress)))


def _files_of_runs(path: Path) -> Iterator[tuple[Path, Callable[[Path], str | None]]]:
    for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
        folders = [path / part for part in file.relative_to(path).parents]  # none that `path` is in
        if any(folder.match(others) for folder in folders for others in WRITTEN_BY_OTHERS):
            continue
        in_run = any((folder / "config.json").exists() for folder in folders)
        if file.suffix == ".safetensors":
            yield file, _problem_of_tensors
        elif file.suffix == ".onnx":
            yield file, _problem_of_onnx
        elif file.suffix == ".pt":
            yield file, _problem_of_archive
        elif file.name == "metrics.jsonl":
            yield file, _problem_of_log
        elif in_run and (file.name in RECORDS or (file.suffix == ".json" and _is_of_eval(folders))):
            yield file, _problem_of_record


def _is_of_eval(folders: Sequence[Path]) -> bool:
    """Whether ``rob eval`` seals what is in the first of these, which the others hold: detections are COCO's."""
    names = [folder.name for folder in folders]
    return "eval" in names and names[0] != "detections"


def _problem_of_tensors(file: Path) -> str | None:
    try:
        read_tensor_file(file)
    except DamagedError as problem:
        return f"{file} {problem}"
    return None


def _problem_of_onnx(file: Path) -> str | None:
    try:
        check_onnx(file)
    except DamagedError as problem:
        return f"{file} {problem}: export it again"
    return None


def _problem_of_archive(file: Path) -> str | None:
    return None if is_whole_archive(file) else f"{file} is damaged or no checkpoint: delete it"


def _problem_of_log(file: Path) -> str | None:
    try:
        read_lines(file, EpochLine)
    except FailureError as problem:
        return str(problem)
    return None


def _problem_of_record(file: Path) -> str | None:
    try:
        read_record(file, dict[str, Any], "delete it")
    except FailureError as problem:
        return str(problem)
    return None
