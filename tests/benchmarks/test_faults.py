"""A small part of the fault bench: one flipped bit and one cut in every kind of file, and one kill of every command."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rob.benchmarks.faults import FaultsConfig, planned
from rob.benchmarks.faults_kinds import BAD, KINDS
from rob.benchmarks.faults_shared import KINDS as SHARED
from rob.benchmarks.faults_world import COMMANDS, FILES, Ended

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_nothing_goes_wrong_in_silence_and_it_goes_on_where_it_stopped(tmp_path):
    """In a process of its own: only one without threads may fork."""
    kinds = ("kill", "damage")
    counts = ("--kills", "1", "--places", "1", "--others", "1", "--small")
    words = [sys.executable, str(SCRIPT), str(tmp_path / "out"), *counts, "--kinds", *kinds]
    lines: list[str] = []
    for subjects in (("--subjects", "manifest of images"), ()):
        done = subprocess.run(
            [*words, *subjects, "--seconds", "300"], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr
        before, lines = lines, (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
        assert lines[: len(before)] == before
    outcomes = {name: outcome for line in lines for name, outcome in json.loads(line).items()}
    assert len(before) == 2
    assert len(outcomes) == len(lines) >= 30  # none was made twice
    assert {name: outcome for name, outcome in outcomes.items() if outcome in BAD} == {}
    assert Counter(outcomes.values())["told"] >= 10  # it is damage that is done


def test_trials_are_as_many_as_are_asked_for():
    names = [trial.name for trial in planned(FaultsConfig(Path("."), kills=8, places=3, others=1))]
    assert len(set(names)) == len(names)
    kinds = Counter(name.split("/")[0] for name in names)
    assert set(kinds) == {*KINDS, *SHARED}
    assert kinds["kill"] == 8 * (len(COMMANDS) - 2) + 2 * 2  # what takes long is tried less often
    assert kinds["damage"] == 3 * 2 * len(FILES)
    assert kinds["full"] == kinds["read-only"] == len(COMMANDS)


@pytest.mark.parametrize(
    ("code", "said", "outcome"),
    [
        (0, "", "same"),
        (1, "error: no", "told"),
        (-9, "", "told"),
        (1, "", "traceback"),
        (-11, "", "traceback"),
        (1, "Traceback (most recent call last)\nerror: x", "traceback"),
        (None, "", "hung"),
    ],
)
def test_a_crash_and_a_bad_exit_without_a_word_are_no_sentences(code, said, outcome):
    assert Ended(code, said).outcome == outcome
