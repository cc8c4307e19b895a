"""What ``faults.py`` does to stores that are made in parts, and to stores and runs in a bucket.

The bucket is the server of ``bucket.py`` on the loopback: its objects are the files of a folder of the trial, in which nothing of
what is made on the way may be left.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from rob.benchmarks.bucket import bucket
from rob.benchmarks.faults_kinds import Scene, Trial, killed
from rob.benchmarks.faults_world import CACHED, CACHING, COMMANDS, Command, Ended, Running, start

KINDS = ("parts", "bucket")
FITTED = ("--encoding", "topk", "--topk", "4", "--prototypes", "8")
PARTS = {
    "cache": replace(COMMANDS["cache"], small_shards=True),
    "cache, fitted": replace(COMMANDS["cache"], words=(*COMMANDS["cache"].words, *FITTED), small_shards=True),
}
THERE, LEAVES = "s3://targets", ("bucket",)
"""An address, and the folder that it stands for."""
NEW = ("cache-teacher", "data.beton", f"{THERE}/new.zarr", *CACHING)
IN_A_BUCKET = {
    "cache": Command(NEW, LEAVES, small_shards=True),
    "cache, fitted": Command((*NEW, *FITTED), LEAVES, small_shards=True),
    "more views": Command(("cache-teacher", "data.beton", f"{THERE}/targets.zarr", *CACHING, "--views", "3"), LEAVES),
    "train cached": Command(("train-student", *CACHED, "--out", f"{THERE}/run"), LEAVES),
}


@contextmanager
def served(trial: Path) -> Iterator[None]:
    """Inside, there is a bucket in the folder of the ``trial``, and copies of what is in it go there, too."""
    os.environ["ROB_LOCAL_DIR"] = str(trial / "local")
    with bucket(trial / LEAVES[0], 0.0):
        yield


def in_parts(scene: Scene) -> list[Ended]:
    """Two to four parts, at once or one after another in any order, each killed; every second time all are then started again, in
    another order. What is missing in the end the command makes by itself."""
    parts, at_once = int(scene.random.integers(2, 5)), scene.random.random() < 0.5
    ended: list[Ended] = []

    def started(order: np.ndarray, name: str) -> list[list[Running]]:
        found = []
        for number in order:
            words = (*scene.command.words, "--part", f"{number + 1}/{parts}")
            found.append(start(replace(scene.command, words=words), scene.folder, scene.logs / f"{name} {number}"))
            if not at_once:
                end(found[-1:], name == "killed")
        return found

    def end(several: list[list[Running]], kill: bool) -> None:
        if kill:
            scene.moment()
        for processes in several:
            for process in processes:
                if kill:
                    process.send(signal.SIGKILL)
                ended.append(process.wait())

    for name in ("killed", "again")[: int(scene.random.integers(1, 3))]:
        several = started(scene.random.permutation(parts), name)
        if at_once:
            end(several, name == "killed")
    return [one for one in ended if one.code != 0]  # a part that ends well says nothing of the store


def trials(kind: str, number: int) -> list[Trial]:
    """Those of a kind with this number."""
    if kind == "parts":
        return [Trial(kind, name, number, command, in_parts) for name, command in PARTS.items()]
    return [
        Trial(kind, f"{name}, {how}", number, command, fault)
        for name, command in IN_A_BUCKET.items()
        for how, fault in (("killed", killed), ("in parts", in_parts))
        if fault is killed or command.small_shards
    ]
