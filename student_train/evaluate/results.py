"""The outcomes of evaluations in a run folder: one ``eval/TASK.json`` a task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ...common.errors import FailureError, MisuseError
from ...common.files import replacing
from ...common.records import read_record, sealed
from ..export.exported_file import NAME as EXPORTED

IDENTITY = {
    "weights": "other weights",
    "image_size": "another image size",
    "pooling": "other features",
    "interpolation": "another interpolation",
    "train_fingerprint": "other training images",
    "test_fingerprint": "another test set",
}
"""Facts of a result that tell whether it is another one, and their names in a note."""


COMPARED = {"test images": ("test_fingerprint", "test"), "training images": ("train_fingerprint",), "k": ("k",)}
"""What is the same in all results that can be compared, and the facts of a result that say it, the first one that is there."""
AGAIN = "delete it and evaluate again"


class Shots(TypedDict):
    """Of one number of labels."""

    labels: str
    mean: float


class Precision(TypedDict):
    ap: float | None


class Result(TypedDict):
    """What is read back of a result; each task has some of it, and more."""

    top1: NotRequired[float]
    results: NotRequired[list[Shots]]
    miou: NotRequired[float]
    box: NotRequired[Precision]
    mask: NotRequired[Precision | None]


def write_result(
    run_folder: Path, task: str, result: Mapping[str, Any], note: Callable[[str], None] = lambda text: None
) -> Path:
    """Writes, or replaces, ``eval/TASK.json``, and returns its path. FailureError: it cannot be written.

    A list of ``results`` with ``labels`` (few labels) is added to what is there, where all else is the same. ``note`` is told
    of an earlier result of something else, whose place this one takes.
    """
    path = run_folder / "eval" / f"{task}.json"
    earlier: dict[str, Any] = {}
    if path.exists():
        try:
            earlier = dict(read_record(path, Result, "it is replaced"))
        except (OSError, FailureError) as problem:
            note(str(problem))
    different = [text for name, text in IDENTITY.items() if earlier and earlier.get(name) != result.get(name)]
    if earlier and "results" in result and not different:
        settings = (result.keys() | earlier.keys()) - {"results", "train", "test"}  # images may lie elsewhere
        different = [f"another {name}" for name in sorted(settings) if earlier.get(name) != result.get(name)]
        if not different:
            by_labels = {entry["labels"]: entry for entry in [*earlier.get("results", []), *result["results"]]}
            result = {**result, "results": list(by_labels.values())}
    if different:
        note(f"{path}: an earlier result with {different[0]} is replaced; another folder keeps results apart")
    with replacing(path) as file:
        file.write(sealed(result, indent=2))
    return path


def read_results(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> what its file says, in alphabetical order: knn, then its controls. MisuseError: a file that is damaged, or no
    result."""
    results: dict[str, dict[str, Any]] = {}
    for path in sorted((run_folder / "eval").glob("*.json"), key=lambda path: path.stem):
        if path.name == EXPORTED:  # of a detector, which is kept there
            continue
        try:
            results[path.stem] = dict(read_record(path, Result, AGAIN))
        except FailureError as problem:
            raise MisuseError(str(problem)) from None
    return results


def of_weights(results: Mapping[str, dict[str, Any]], weights: str) -> dict[str, dict[str, Any]]:
    """Those of a network with these ``weights``, and of its untrained form; what does not say whose it is stays."""
    return {
        task: result
        for task, result in results.items()
        if task.endswith("-random") or result.get("weights", weights) == weights
    }


def others_left_out(run: str, tasks: Sequence[str]) -> str:
    """A sentence about results that are not of the student in ``run``."""
    return (
        f"{run}: {' and '.join(tasks)} left out, measured on other weights than the student has now, or on another network: "
        "measure again with rob eval"
    )


def not_comparable(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Sentences about tasks whose results say nothing side by side. ``results``: run -> task -> what its file says."""
    found = []
    for task in sorted({task for tasks in results.values() for task in tasks}):
        told = {run: tasks[task] for run, tasks in results.items() if task in tasks}
        for name, facts in COMPARED.items():
            values = {
                run: next((result[fact] for fact in facts if fact in result), None) for run, result in told.items()
            }
            runs = {value: run for run, value in values.items() if value is not None}
            if len(runs) > 1:
                found.append(f"{task}: {' and '.join(runs.values())} differ in their {name}: do not compare them")
    return found
