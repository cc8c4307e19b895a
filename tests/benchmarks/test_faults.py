"""A small part of the fault bench: one flipped bit and one cut in every kind of file, and one kill."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace

import pytest

from rob.benchmarks.faults import FaultsConfig, kept_outcomes, make_trials, planned
from rob.benchmarks.faults_kinds import BAD, KINDS
from rob.benchmarks.faults_shared import KINDS as SHARED
from rob.benchmarks.faults_world import COMMANDS, FILES, Ended

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_nothing_goes_wrong_in_silence(tmp_path):
    """In a process of its own: only one without threads may fork. Kills of the other commands have tests of their own."""
    words = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--kinds", "kill", "damage", "--small"]
    words += ["--kills", "1", "--places", "1", "--subjects", "train cached", "a bit flipped", "cut"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    outcomes = {name: outcome for line in lines for name, outcome in json.loads(line).items()}
    assert len(outcomes) == len(lines) >= 29  # one kill, and a bit and a cut of each kind of file
    assert {name: outcome for name, outcome in outcomes.items() if outcome in BAD} == {}
    assert Counter(outcomes.values())["told"] >= 10  # it is damage that is done


def test_it_goes_on_where_it_stopped(tmp_path):
    made, config = [], FaultsConfig(tmp_path, kinds=("damage",), places=1, subjects=("manifest",))
    bench = SimpleNamespace(out=tmp_path, attempt=lambda trial, seed: made.append(trial.name) or "told")
    make_trials(replace(config, subjects=("manifest of images",)), bench, kept_outcomes(tmp_path), False, inf)
    assert len(made) == 2
    make_trials(config, bench, kept_outcomes(tmp_path), False, inf)
    assert len(made) == len(set(made)) == 6


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
