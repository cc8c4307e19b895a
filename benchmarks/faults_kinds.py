"""What ``faults.py`` does to a command: each fault disturbs it in a scene, and gives how its processes ended.

The frame is one for all (``attempt``): a copy of the world on a file system of its own, the disturbed command, then what it left
is held against what an undisturbed one leaves, and unless the fault lies in a file, the command runs again, undisturbed.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rob.benchmarks.faults_clock import set_clock
from rob.benchmarks.faults_world import (
    COMMANDS,
    FILES,
    LAUNCHED,
    TRAINED,
    Command,
    Ended,
    Running,
    copy_into,
    empty_folder,
    left_behind,
    mount,
    room_left,
    run,
    start,
)

BAD = ("silent", "traceback", "differing", "hung")
DAY = 86_400
"""Seconds."""


@dataclass(frozen=True)
class Scene:
    """``folder`` with a copy of the world, in which ``command`` is disturbed; undisturbed it leaves ``wanted``, takes
    ``seconds`` and writes ``bytes``."""

    folder: Path
    command: Command
    logs: Path
    wanted: dict[str, Any]
    seconds: float
    bytes: int
    random: np.random.Generator

    def start(self, name: str = "disturbed") -> list[Running]:
        return start(self.command, self.folder, self.logs / name)

    def moment(self, earliest: float = 0.0) -> None:
        """Waits for a random one of the command's life."""
        time.sleep(self.random.uniform(earliest, 1.0) * self.seconds)

    def whole(self, name: str) -> bool:
        """Whether that output is what an undisturbed command leaves."""
        wanted = {path: content for path, content in self.wanted.items() if Path(path).is_relative_to(name)}
        return left_behind(self.folder, (name,)) == wanted


Fault = Callable[[Scene], list[Ended]]


# ==== the faults ====


def killed(scene: Scene) -> list[Ended]:
    processes = scene.start()
    scene.moment()
    for process in processes:
        process.send(signal.SIGKILL)
    return [process.wait() for process in processes]


def signalled(scene: Scene) -> list[Ended]:
    """SIGINT or SIGTERM, two to six times within 50 ms, to all ranks."""
    processes = scene.start()
    scene.moment()
    for _ in range(int(scene.random.integers(2, 7))):
        number = int(scene.random.choice([signal.SIGINT, signal.SIGTERM]))
        for process in processes:
            process.send(number)
        time.sleep(scene.random.uniform(0, 0.01))
    return [process.wait() for process in processes]


def full(scene: Scene) -> list[Ended]:
    """A disk with room for a random part of what the command writes."""
    room_left(scene.folder, int(scene.random.uniform(0, scene.bytes)))
    ended = run(scene.command, scene.folder, scene.logs / "disturbed")
    mount("-o", "remount,size=1g", str(scene.folder))
    return ended


def read_only(scene: Scene) -> list[Ended]:
    """The file system can only be read, from the start, or from a random moment on at which nothing is being written."""
    earlier = scene.random.random() < 0.3 and mount("-o", "remount,ro", str(scene.folder))
    processes = scene.start()
    if not earlier:
        scene.moment()
        end = time.monotonic() + scene.seconds
        while not mount("-o", "remount,ro", str(scene.folder)) and time.monotonic() < end:
            time.sleep(0.01)
    ended = [process.wait() for process in processes]
    mount("-o", "remount,rw", str(scene.folder))
    return ended


def vanished(scene: Scene) -> list[Ended]:
    """A folder or file that the command reads is away from a random moment on; or what it writes is lost, unless it was whole by
    then and only the process had not ended."""
    processes = scene.start()
    scene.moment()
    there = [name for name in (*scene.command.reads, *scene.command.leaves) if (scene.folder / name).exists()]
    name, away = str(scene.random.choice(there)), scene.folder / "away"
    with contextlib.suppress(FileNotFoundError):
        (scene.folder / name).rename(away)
    ended = [process.wait() for process in processes]
    if away.exists() and not (scene.folder / name).exists():
        away.rename(scene.folder / name)
        if name in scene.command.leaves and not scene.whole(name):
            (scene.folder / name).rename(away)
    return ended


def twice(scene: Scene) -> list[Ended]:
    """Two processes with one output."""
    first = scene.start("first")
    scene.moment()
    second = scene.start("second")
    return [process.wait() for process in (*first, *second)]


def clock_set_back(scene: Scene) -> list[Ended]:
    """A day ahead at its start, a day behind from a random moment on; every second time it is killed there, and goes on with the
    right time."""
    set_clock(DAY)
    processes = scene.start()
    scene.moment()
    set_clock(-DAY)
    if scene.random.random() < 0.5:
        for process in processes:
            process.send(signal.SIGKILL)
    ended = [process.wait() for process in processes]
    set_clock(0)
    return ended


def one_rank(frozen: bool, scene: Scene) -> list[Ended]:
    """One of two is killed, or stopped; the other, or torchrun, is then asked to end. A killed one that torchrun replaces is
    left to it."""
    started = scene.start()
    scene.moment(0.3)
    launched = scene.command.torchrun is not None
    victims = started[0].children() if launched else [started[1].process]
    for victim in victims[-1:]:
        os.kill(victim, signal.SIGSTOP if frozen else signal.SIGKILL)
    if frozen or not launched:
        time.sleep(0.2 if frozen else 5.0)
        started[0].send(signal.SIGTERM)  # a rank that was told of a death may have ended by itself
    ended = [started[0].wait()]
    for victim in victims[-1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    for process in started[1:]:
        process.wait()
    return ended


def damaged(pattern: str, cut: bool, scene: Scene) -> list[Ended]:
    """A flipped bit, or a cut, at a random place of a file."""
    (file,) = scene.folder.glob(pattern)
    content = bytearray(file.read_bytes())
    at = int(scene.random.integers(len(content)))
    if cut:
        del content[at:]
    else:
        content[at] ^= 1 << int(scene.random.integers(8))
    file.write_bytes(content)
    return run(scene.command, scene.folder, scene.logs / "disturbed")


# ==== their frame ====


class Bench:
    """A world in ``out``, and what each command leaves and takes in it, undisturbed: made once."""

    def __init__(self, out: Path, mounts: bool) -> None:
        self.out, self.world, self.mounts = out, out / "world", mounts
        self._undisturbed: dict[Command, tuple[dict[str, Any], float, int]] = {}

    def folder(self) -> Path:
        folder = empty_folder(self.out / "trial", self.mounts)
        copy_into(folder, self.world)
        return folder

    def undisturbed(self, command: Command) -> tuple[dict[str, Any], float, int]:
        """What it leaves, its seconds, and the bytes that it writes."""
        if command not in self._undisturbed:
            folder, began = self.folder(), time.monotonic()
            ended = run(command, folder, self.out / "logs")
            seconds = time.monotonic() - began
            if any(one.code != 0 for one in ended):
                raise RuntimeError(f"{' '.join(command.words)}: {ended[0].said}")
            files = [file for name in command.leaves for file in (folder / name, *(folder / name).rglob("*"))]
            written = sum(file.stat().st_size for file in files if file.is_file())
            self._undisturbed[command] = left_behind(folder, command.leaves), seconds, written
        return self._undisturbed[command]

    def attempt(self, trial: "Trial", seed: int) -> str:
        """The outcome of a trial; where that is bad, what it left is kept in ``out/bad``."""
        wanted, seconds, written = self.undisturbed(trial.command)
        logs = self.out / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        random = np.random.default_rng([seed, *trial.name.encode()])
        scene = Scene(self.folder(), trial.command, logs, wanted, seconds, written, random)
        outcome = _outcome(scene, trial)
        if outcome in BAD:
            kept = self.out / "bad" / trial.name.replace("/", ", ")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(scene.folder, kept, symlinks=True)
            shutil.copytree(logs, kept / "logs")
        return outcome


def _outcome(scene: Scene, trial: "Trial") -> str:
    ended = trial.fault(scene)
    for one in ended:
        if one.outcome in BAD:
            return one.outcome
    well = (all if scene.command.ranks > 1 else any)(one.code == 0 for one in ended)
    same = left_behind(scene.folder, scene.command.leaves) == scene.wanted
    if trial.kind == "damage":
        if not well:
            return "told"
        return (
            "same" if same else "told" if "has lost" in ended[0].said else "silent"
        )  # of a log, a run that goes on says so
    if well and not same:
        return "silent"
    again = run(scene.command, scene.folder, scene.logs / "again")
    for one in again:
        complete = one.code == 2 and "already" in one.said  # disturbed after its last step
        if one.outcome != "same" and not complete:
            return "differing" if one.outcome == "told" else one.outcome
    return "same" if left_behind(scene.folder, scene.command.leaves) == scene.wanted else "differing"


@dataclass(frozen=True)
class Trial:
    kind: str
    subject: str
    number: int
    command: Command
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.subject}/{self.number}"


DISTURBED: dict[str, Fault] = {
    "kill": killed,
    "signals": signalled,
    "full": full,
    "read-only": read_only,
    "vanish": vanished,
    "twice": twice,
    "clock": clock_set_back,
}
KINDS = (*DISTURBED, "ranks", "damage")
SELDOM = ("export", "sweep", *LAUNCHED)
"""What takes long: every fourth trial."""
WITHOUT_SMALL = (*SELDOM, "exported ONNX", "export.json", "sweep's record")
"""What a small world has not."""
NEED_MOUNTS, NEED_CLOCK = ("full", "read-only"), ("clock",)


def trials(kind: str, number: int) -> list[Trial]:
    """Those of a kind with this number: one of each command, or of each kind of file."""
    if kind == "damage":
        return [
            Trial(kind, f"{name}, {'cut' if cut else 'a bit flipped'}", number, command, partial(damaged, pattern, cut))
            for name, (pattern, command) in FILES.items()
            for cut in (False, True)
        ]
    if kind == "ranks":
        commands = {"": TRAINED, **{f"{name}, ": command for name, command in LAUNCHED.items()}}
        return [
            Trial(kind, f"{name}one {'frozen' if frozen else 'killed'}", number, command, partial(one_rank, frozen))
            for name, command in commands.items()
            for frozen in (False, True)
            if number % 4 == 0 or name.removesuffix(", ") not in SELDOM
        ]
    disturbed = DISTURBED[kind]
    return [
        Trial(kind, name, number, command, disturbed)
        for name, command in COMMANDS.items()
        if (number % 4 == 0 or name not in SELDOM) and (kind != "twice" or command.ranks == 1)
    ]
