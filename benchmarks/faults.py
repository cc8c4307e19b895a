"""Faults: commands killed, files damaged, disks full, two at once; does anything go wrong in silence?

    python benchmarks/faults.py runs/faults [--kills 20] [--places 20] [--others 5] [--kinds kill damage full ...]

Every trial disturbs a command in a copy of one small world (images, a store, a run, an exported file, a sweep), in a process
forked from this one, and then the command is run again, undisturbed. Its outcome is one of

    same        all that is compared is byte for byte what an undisturbed run leaves
    told        the damage was refused in one sentence
    silent      the command said it was well, and what it left differs
    traceback   Python's, a crash, or a bad exit without a word, where a sentence belongs
    differing   after the second run, bytes differ, or it does not run
    hung        it did not end in time, and was killed

As root on Linux every trial has a small file system in memory of its own, which can be full or read-only; without it those two
kinds are left out. The clock is set back by a library over libc's, which needs a C compiler. Trials are drawn from their number
and kept in OUT/trials.jsonl: killed, or called with more, it goes on.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rob.benchmarks.faults_clock import CLOCK, environment
from rob.benchmarks.faults_kinds import BAD, KINDS, NEED_CLOCK, NEED_MOUNTS, WITHOUT_SMALL, Bench, Trial, trials
from rob.benchmarks.faults_shared import KINDS as SHARED
from rob.benchmarks.faults_shared import served
from rob.benchmarks.faults_shared import trials as shared_trials
from rob.benchmarks.faults_world import make_world, own_mounts
from rob.benchmarks.kept import keep_settings


@dataclass(frozen=True)
class FaultsConfig:
    out: Path
    kills: int = 20
    """Of each command."""
    places: int = 20
    """Of each kind of file: so many flipped bits and so many cuts."""
    others: int = 5
    """Of each other fault and command."""
    kinds: tuple[str, ...] = (*KINDS, *SHARED)
    subjects: tuple[str, ...] = ()
    """Those whose name has one of these words alone; empty: all."""
    small: bool = False
    """A world without exported files and sweeps, which take the most time."""
    seed: int = 0

    def count(self, kind: str) -> int:
        return {"damage": self.places}.get(kind, self.kills if kind in ("kill", *SHARED) else self.others)


def planned(config: FaultsConfig) -> Iterator[Trial]:
    """All of them, the numbers first, so that a bench that is stopped has some of each."""
    for number in range(max(map(config.count, config.kinds), default=0)):
        for kind in config.kinds:
            made = shared_trials if kind in SHARED else trials
            for trial in made(kind, number) if number < config.count(kind) else ():
                large = any(trial.subject.startswith(word) for word in WITHOUT_SMALL)
                wanted = not config.subjects or any(word in trial.subject for word in config.subjects)
                if wanted and not (large and config.small):
                    yield trial


def kept_outcomes(out: Path) -> dict[str, str]:
    """Name of a trial -> its outcome."""
    kept, done = out / "trials.jsonl", {}
    for line in kept.read_text().splitlines(keepends=True) if kept.exists() else ():
        if line.endswith("\n"):
            done |= json.loads(line)
    return done


def faults(config: FaultsConfig, mounts: bool, seconds: float = float("inf")) -> list[dict[str, Any]]:
    """Rows of the table, one for each kind and subject, of all trials that were made until now."""
    out, end = config.out.absolute(), time.monotonic() + seconds
    keep_settings(out, {"seed": config.seed, "small": config.small})
    make_world(out / "world", config.small)
    bench, done = Bench(out, mounts), kept_outcomes(out)
    with served(out / "trial") if "bucket" in config.kinds else contextlib.nullcontext():
        make_trials(config, bench, done, mounts, end)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for name, outcome in done.items():
        kind, subject, _ = name.split("/")
        counts.setdefault((kind, subject), Counter())[outcome] += 1
    return [
        {"fault": kind, "what": subject, "tried": found.total(), "same": found["same"], "told": found["told"]}
        | {name: found[name] for name in BAD}
        for (kind, subject), found in sorted(counts.items())
    ]


def make_trials(config: FaultsConfig, bench: Bench, done: dict[str, str], mounts: bool, end: float) -> None:
    """Those that are not ``done`` yet, until ``end``."""
    for trial in planned(config):
        if trial.name in done or time.monotonic() > end:
            continue
        if (trial.kind in NEED_MOUNTS and not mounts) or (trial.kind in NEED_CLOCK and CLOCK not in os.environ):
            continue
        done[trial.name] = bench.attempt(trial, config.seed)
        with open(bench.out / "trials.jsonl", "a") as file:
            file.write(json.dumps({trial.name: done[trial.name]}) + "\n")
        if done[trial.name] in BAD:
            print(trial.name, done[trial.name], flush=True)


def with_another_clock(config: FaultsConfig) -> bool:
    """This command once more, for the trials that set the clock back; False where that cannot be."""
    changed = environment(config.out.absolute())
    if changed is not None:
        subprocess.run([sys.executable, *sys.argv, "--kinds", *NEED_CLOCK], env={**os.environ, **changed}, check=True)
    return changed is not None


def import_all(small: bool = False) -> None:
    """What commands import, once, before all forks."""
    import importlib

    stages = ("student_train.train", "student_train.sweep", "student_train.embed", "student_train.evaluate.compare")
    for name in (
        "rob.cli",
        "rob.teacher_cache.cache",
        "rob.student_train.export",
        *(f"rob.{stage}" for stage in stages),
    ):
        importlib.import_module(name)
    others = ("matplotlib.backends.backend_agg", "onnx", "onnxruntime", "onnxscript", "torch.onnx")
    for name in others[: 1 if small else None]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--places", type=int, default=20)
    parser.add_argument("--others", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *SHARED), default=[*KINDS, *SHARED])
    parser.add_argument(
        "--subjects", nargs="+", default=[], help="Commands and kinds of file with one of these words alone."
    )
    parser.add_argument("--small", action="store_true", help="Without exported files and sweeps.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Begin no trial after so long.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads may not fork
    settings = FaultsConfig(
        given.out, given.kills, given.places, given.others, tuple(given.kinds), tuple(given.subjects), given.small
    )
    left_out = []
    if "clock" in given.kinds and CLOCK not in os.environ and not with_another_clock(settings):
        left_out.append("no clock was set back: that needs Linux and a C compiler")
    mounts = own_mounts()
    if not mounts and set(given.kinds) & set(NEED_MOUNTS):
        left_out.append("no disk was full or read-only: only root on Linux may mount one")
    import_all(given.small)
    gc.freeze()

    found = faults(settings, mounts, given.seconds)
    if CLOCK not in os.environ:
        import torch

        from rob.benchmarks.report import Report

        totals = {name: sum(row[name] for row in found) for name in ("tried", *BAD)}
        work = {name: value for name, value in asdict(settings).items() if name != "out"}
        report = Report.of("faults", torch.device("cpu"), work | {"left out": left_out}, found, totals)
        report.show()
        print(report.write())
