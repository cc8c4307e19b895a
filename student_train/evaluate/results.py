"""The outcomes of evaluations in a run folder: one ``eval/TASK.json`` a task."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.errors import MisuseError
from ..checkpoint import replacing


def write_result(run_folder: Path, task: str, result: Mapping[str, Any]) -> Path:
    """Writes, or replaces, ``eval/TASK.json``, and returns its path. FailureError: it cannot be written."""
    path = run_folder / "eval" / f"{task}.json"
    with replacing(path) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return path


def read_results(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Task -> what its file says, in alphabetical order. MisuseError: a file that is not JSON."""
    results = {}
    for path in sorted((run_folder / "eval").glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text())
        except ValueError:
            raise MisuseError(f"{path} is not JSON: delete it and evaluate again") from None
    return results
