"""Faults: commands killed, files damaged, disks full, two at once; does anything go wrong in silence?

    python benchmarks/faults.py runs/faults [--kills 100] [--places 20] [--kinds kill damage full twice signals ranks]

Every trial works on a copy of one small world (images, a store, a run, a sweep), in a process forked from this one, and then the
command is run again, undisturbed. Its outcome is one of

    same        all that is compared is byte for byte what an undisturbed run leaves
    told        the damage was refused in one sentence
    silent      the command said it was well, and its results differ
    traceback   Python's, where a sentence belongs
    differing   after the second run, bytes differ
    hung        it did not end in time, and was killed

Trials are drawn from their number and kept in OUT/trials.jsonl: killed, or called with more, it goes on.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rob.benchmarks.faults_world import (
    COMMANDS,
    DAMAGED,
    as_rank,
    copy_of,
    free_port,
    left_behind,
    make_world,
    run,
    start,
    wait,
)

KINDS = ("kill", "damage", "full", "twice", "signals", "ranks")
SLOW = ("sweep", "sweep's record")
"""What starts Python anew for every run: tried with ``--sweeps`` alone."""
BAD = ("silent", "traceback", "differing", "hung")


@dataclass(frozen=True)
class FaultsConfig:
    out: Path
    kills: int = 100
    """Of each command."""
    places: int = 20
    """Of each kind of file: so many flipped bytes and so many cuts."""
    kinds: tuple[str, ...] = KINDS
    sweeps: bool = False
    seed: int = 0


# ==== trials ====


@dataclass(frozen=True)
class Trial:
    kind: str
    subject: str
    number: int
    run: Callable[["Bench", np.random.Generator], str]

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.subject}/{self.number}"


class Bench:
    """Runs trials in ``out``, against undisturbed runs that are made once."""

    def __init__(self, out: Path, sweeps: bool) -> None:
        self.out, self.world = out, out / "world"
        self.wanted: dict[tuple[str, ...], tuple[dict[str, Any], float]] = {}
        make_world(self.world, sweeps)

    def folder(self) -> Path:
        return copy_of(self.world, self.out / "trial")

    def undisturbed(self, words: tuple[str, ...], names: tuple[str, ...]) -> tuple[dict[str, Any], float]:
        """What the command leaves, and its seconds."""
        if words not in self.wanted:
            folder = copy_of(self.world, self.out / "undisturbed")
            began = time.monotonic()
            ended = run(words, folder)
            if ended.code != 0:
                raise RuntimeError(f"{' '.join(words)}: {ended.said}")
            self.wanted[words] = left_behind(folder, names), time.monotonic() - began
        return self.wanted[words]

    def again(self, words: tuple[str, ...], names: tuple[str, ...], folder: Path) -> str:
        """The outcome once the command has run undisturbed in ``folder``."""
        wanted, _ = self.undisturbed(words, names)
        ended = run(words, folder)
        complete = ended.code == 2 and "already" in ended.said  # killed after its last step
        if ended.outcome != "same" and not complete:
            return "differing" if ended.outcome == "told" else ended.outcome
        return "same" if left_behind(folder, names) == wanted else "differing"


def killed(subject: str) -> Callable[[Bench, np.random.Generator], str]:
    words, names = COMMANDS[subject]

    def trial(bench: Bench, random: np.random.Generator) -> str:
        _, seconds = bench.undisturbed(words, names)
        folder = bench.folder()
        process = start(words, folder)
        time.sleep(random.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return bench.again(words, names, folder)

    return trial


def damaged(subject: str, cut: bool) -> Callable[[Bench, np.random.Generator], str]:
    pattern, words, names = DAMAGED[subject]

    def trial(bench: Bench, random: np.random.Generator) -> str:
        wanted, _ = bench.undisturbed(words, names)
        folder = bench.folder()
        (file,) = folder.glob(pattern)
        content = bytearray(file.read_bytes())
        at = int(random.integers(len(content)))
        if cut:
            del content[at:]
        else:
            content[at] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        ended = run(words, folder)
        if ended.outcome != "same":
            return ended.outcome
        same = left_behind(folder, names) == wanted
        return (
            "same" if same else "told" if "has lost" in ended.said else "silent"
        )  # of a log, a run that goes on says so

    return trial


def full(subject: str) -> Callable[[Bench, np.random.Generator], str]:
    """No file may be longer than so many bytes: the kernel refuses the rest, as a full disk does."""
    words, names = COMMANDS[subject]

    def trial(bench: Bench, random: np.random.Generator) -> str:
        wanted, _ = bench.undisturbed(words, names)
        folder = bench.folder()
        largest = max(len(content) for content in wanted.values() if isinstance(content, bytes))
        limit = int(random.integers(1, max(2, largest)))
        ended = run(words, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        return ended.outcome if ended.outcome in BAD else bench.again(words, names, folder)

    return trial


def twice(subject: str) -> Callable[[Bench, np.random.Generator], str]:
    """Two processes with one output: at least one does it, and neither spoils it."""
    words, names = COMMANDS[subject]

    def trial(bench: Bench, random: np.random.Generator) -> str:
        _, seconds = bench.undisturbed(words, names)
        folder = bench.folder()
        first = start(words, folder, log="first")
        time.sleep(random.uniform(0, seconds))
        second = start(words, folder, log="second")
        outcomes = [wait(first, folder, log="first").outcome, wait(second, folder, log="second").outcome]
        bad = [outcome for outcome in outcomes if outcome in BAD]
        return bad[0] if bad else bench.again(words, names, folder)

    return trial


def signalled(subject: str) -> Callable[[Bench, np.random.Generator], str]:
    """SIGINT or SIGTERM, two to six times within 50 ms: it ends, and goes on to the same."""
    words, names = COMMANDS[subject]

    def trial(bench: Bench, random: np.random.Generator) -> str:
        _, seconds = bench.undisturbed(words, names)
        folder = bench.folder()
        process = start(words, folder)
        time.sleep(random.uniform(0, seconds))
        for _ in range(int(random.integers(2, 7))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, int(random.choice([signal.SIGINT, signal.SIGTERM])))
            time.sleep(random.uniform(0, 0.01))
        ended = wait(process, folder)
        return ended.outcome if ended.outcome in BAD else bench.again(words, names, folder)

    return trial


def with_two_ranks(frozen: bool) -> Callable[[Bench, np.random.Generator], str]:
    """One of two ranks is killed, or stopped; the other, asked to end, ends in a sentence; alone the run then goes on."""
    words, _ = COMMANDS["train cached"]

    def trial(bench: Bench, random: np.random.Generator) -> str:
        _, seconds = bench.undisturbed(*COMMANDS["train cached"])
        folder, port = bench.folder(), free_port()
        ranks = [start(words, folder, as_rank(rank, port), log=f"rank{rank}") for rank in range(2)]
        time.sleep(random.uniform(0.3, 1.2) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[1], signal.SIGSTOP if frozen else signal.SIGKILL)
            time.sleep(0.2 if frozen else 5.0)
            os.kill(
                ranks[0], signal.SIGTERM
            )  # as torchrun does; a rank that was told of a death may have ended by itself
        ended = wait(ranks[0], folder, log="rank0")
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[1], signal.SIGKILL)
        os.waitpid(ranks[1], 0)
        if ended.outcome in BAD:
            return ended.outcome
        again = run(words, folder)
        return "same" if again.outcome == "same" and (folder / "new" / "student.safetensors").exists() else "differing"

    return trial


def trials(config: FaultsConfig) -> Iterator[Trial]:
    """All of them, the numbers first, so that a bench that is stopped has some of each."""
    for number in range(max(config.kills, config.places)):
        if number < config.kills:
            for kind, make in (("kill", killed), ("full", full), ("twice", twice), ("signals", signalled)):
                few = number < max(1, config.kills // (1 if kind == "kill" else 4))
                for subject in COMMANDS if kind in config.kinds and few else ():
                    if kind in ("kill", "signals") or subject != "sweep":
                        yield Trial(kind, subject, number, make(subject))
            if "ranks" in config.kinds and number < max(1, config.kills // 4):
                yield Trial("ranks", "one killed", number, with_two_ranks(False))
                yield Trial("ranks", "one frozen", number, with_two_ranks(True))
        if number < config.places and "damage" in config.kinds:
            for subject in DAMAGED:
                yield Trial("damage", f"{subject}, a byte flipped", number, damaged(subject, cut=False))
                yield Trial("damage", f"{subject}, cut", number, damaged(subject, cut=True))


def faults(config: FaultsConfig, seconds: float = float("inf")) -> list[dict[str, Any]]:
    """Rows of the table, one for each kind and subject, of all trials that were made until now."""
    config.out.mkdir(parents=True, exist_ok=True)
    kept, end = config.out / "trials.jsonl", time.monotonic() + seconds
    done: dict[str, str] = {}
    for line in kept.read_text().splitlines(keepends=True) if kept.exists() else ():
        if line.endswith("\n"):
            done |= json.loads(line)
    bench = Bench(config.out.absolute(), config.sweeps)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for trial in trials(config):
        if any(trial.subject.startswith(name) for name in SLOW) and not config.sweeps:
            continue
        if trial.name not in done:
            if time.monotonic() > end:
                continue
            random = np.random.default_rng([config.seed, *trial.name.encode()])
            done[trial.name] = trial.run(bench, random)
            if done[trial.name] in BAD:
                shutil.copytree(
                    bench.out / "trial", bench.out / "bad" / trial.name.replace("/", ", "), dirs_exist_ok=True
                )
            with open(kept, "a") as file:
                file.write(json.dumps({trial.name: done[trial.name]}) + "\n")
        counts.setdefault((trial.kind, trial.subject), Counter())[done[trial.name]] += 1
    return [
        {"fault": kind, "what": subject, "tried": found.total(), "same": found["same"], "told": found["told"]}
        | {name: found[name] for name in BAD}
        for (kind, subject), found in sorted(counts.items())
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--places", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sweeps", action="store_true", help="Sweeps too: a minute each.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Begin no trial after so long.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads may not fork
    import rob.cli
    import rob.student_train.train
    import rob.teacher_cache.cache  # noqa: F401 (imported once, before all forks)

    found = faults(FaultsConfig(given.out, given.kills, given.places, tuple(given.kinds), given.sweeps), given.seconds)
    import torch

    from rob.benchmarks.report import Report

    totals = {name: sum(row[name] for row in found) for name in ("tried", *BAD)}
    report = Report.of("faults", torch.device("cpu"), {"seconds": given.seconds}, found, totals)
    report.show()
    print(report.write())
