"""A small part of the fault bench: one flipped byte and one cut in every kind of file, and one kill of every command."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rob.benchmarks.faults import BAD, FaultsConfig, trials

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_nothing_goes_wrong_in_silence_and_it_goes_on_where_it_stopped(tmp_path):
    """In a process of its own: only one without threads may fork."""
    words = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path / "out"),
        "--kills",
        "1",
        "--places",
        "1",
        "--kinds",
        "kill",
        "damage",
    ]
    outcomes: dict[str, str] = {}
    for seconds in ("0", "300"):
        done = subprocess.run(
            [*words, "--seconds", seconds], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr
        kept = tmp_path / "out" / "trials.jsonl"
        for line in kept.read_text().splitlines() if kept.exists() else ():
            outcomes |= json.loads(line)
    assert len(outcomes) >= 30
    assert {name: outcome for name, outcome in outcomes.items() if outcome in BAD} == {}
    assert Counter(outcomes.values())["told"] >= 10  # it is damage that is done


def test_trials_are_as_many_as_are_asked_for():
    names = [trial.name for trial in trials(FaultsConfig(Path("."), kills=8, places=3))]
    assert len(set(names)) == len(names)
    kinds = Counter(name.split("/")[0] for name in names)
    assert kinds["kill"] == 8 * 6
    assert kinds["damage"] == 3 * 2 * 14
    assert kinds["ranks"] == 2 * 2
