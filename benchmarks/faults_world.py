"""The small world of ``faults.py``: images, a store, a run; commands in processes forked from one that has imported all."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 120.0
"""Seconds after which a command hangs."""
TEACHER = "test_efficientnet_gn"
FAST = ("--loader", "torch", "--workers", "1", "--device", "cpu")
STUDENT = (
    "--student",
    "test_resnet",
    "--no-small-images",
    "--image-size",
    "32",
    "--hidden-dim",
    "16",
    "--batch-size",
    "16",
)
CACHED = ("data.beton", "--targets", "targets.zarr", *STUDENT, "--epochs", "3", *FAST)
MOMENTUM = ("data.beton", "--targets", "momentum", *STUDENT, "--prototypes", "16", "--epochs", "3", *FAST)
KNN = ("data.beton", "--k", "3", "--workers", "1", "--loader", "torch", "--device", "cpu")
CACHE = ("cache-teacher", "data.beton", "new.zarr", "--teacher", TEACHER, "--checkpoint", "teacher.safetensors")

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pack": (("pack", "images", "new.beton", "--workers", "1"), ("new.beton", "new.beton.json")),
    "cache": ((*CACHE, "--view-size", "32", "--views", "2", *FAST), ("new.zarr",)),
    "train cached": (("train-student", *CACHED, "--out", "new"), ("new",)),
    "train momentum": (("train-student", *MOMENTUM, "--out", "new"), ("new",)),
    "eval knn": (("eval", "knn", "run", *KNN, "--out", "new"), ("new",)),
    "sweep": (("sweep", "new", "--vary", "seed=1,2", "--device", "cpu", "--", *CACHED[:-2]), ("new",)),
}
"""Name -> words of the command line, and what they leave behind."""

HALF = ("cache-teacher", "data.beton", "half.zarr", *COMMANDS["cache"][0][3:])
RESUMED, KNN_OF_RUN = ("train-student", *CACHED, "--out", "run"), ("eval", "knn", "run", *KNN)
DAMAGED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "packed images": ("data.beton", ("eval", "knn", "pixels", *KNN, "--out", "new"), ("new",)),
    "manifest of images": ("data.beton.json", ("eval", "knn", "pixels", *KNN, "--out", "new"), ("new",)),
    "manifest of a store": ("targets.zarr/zarr.json", ("train-student", *CACHED, "--out", "new"), ("new",)),
    "shard of a store": ("targets.zarr/embedding/c/0/0/0", ("train-student", *CACHED, "--out", "new"), ("new",)),
    "sums of a store": ("targets.zarr/statistics/embedding_sum/c/0", ("check", "targets.zarr"), ("targets.zarr",)),
    "journal": (
        "half.zarr/pending/chunk-00000000.npz",
        HALF,
        ("half.zarr",),
    ),
    "journal's manifest": (
        "half.zarr/pending/manifest.json",
        HALF,
        ("half.zarr",),
    ),
    "checkpoint": ("run/checkpoint.pt", RESUMED, ("run/student.safetensors",)),
    "weights": ("run/student.safetensors", (*KNN_OF_RUN, "--out", "new"), ("new",)),
    "kept features": ("run/eval/features/*/000000000.safetensors", KNN_OF_RUN, ("run/eval",)),
    "result": ("run/eval/knn.json", ("compare", "run", "--out", "new.png"), ("new.json",)),
    "log": ("run/metrics.jsonl", RESUMED, ("run/metrics.jsonl",)),
    "configuration": ("run/config.json", ("check", "run"), ("run",)),
    "sweep's record": ("sweep/seed=1/sweep.json", ("sweep", "sweep", *COMMANDS["sweep"][0][2:]), ("sweep/sweep.json",)),
}
"""Kind of file -> the file, the command that reads it, and what that leaves behind."""


# ==== commands in forked processes ====


@dataclass(frozen=True)
class Ended:
    code: int | None
    """None: it hung, and was killed."""
    said: str

    @property
    def outcome(self) -> str:
        if self.code is None:
            return "hung"
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        return "same" if self.code == 0 else "told"


def start(words: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None, log: str = "log") -> int:
    """A forked ``rob WORDS`` in ``folder``; what it says goes to its file ``log``."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        from rob.cli import main

        sys.argv = ["rob", *words]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(process: int, folder: Path, seconds: float = PATIENCE, log: str = "log") -> Ended:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), (folder / log).read_text(errors="replace"))
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return Ended(None, (folder / log).read_text(errors="replace"))


def run(words: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None) -> Ended:
    return wait(start(words, folder, prepare), folder)


def as_rank(rank: int, port: int) -> Callable[[], None]:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return lambda: os.environ.update({name: str(value) for name, value in told.items()})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ==== the world, and what is compared ====


def make_world(folder: Path, sweeps: bool) -> None:
    """Images, a teacher, a store and a half-written one, a run with a result, and perhaps a sweep."""
    if (folder / "done").exists() and (not sweeps or (folder / "sweep").exists()):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def prepare() -> None:
        import timm
        import torch
        from PIL import Image
        from safetensors.torch import save_file

        for row in range(48):
            coarse = np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            path = Path("images") / f"class{row % 3}" / f"{row:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path, quality=92)
        torch.manual_seed(0)
        save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), "teacher.safetensors")

    steps = (
        (("pack", "images", "data.beton", "--workers", "1"), prepare),
        (("cache-teacher", "data.beton", "targets.zarr", *COMMANDS["cache"][0][3:]), lambda: None),
        (HALF, _stop_before_the_end),
        (RESUMED, lambda: None),
        (KNN_OF_RUN, lambda: None),
        *([(("sweep", "sweep", *COMMANDS["sweep"][0][2:]), lambda: None)] if sweeps else []),
    )
    for words, before in steps:
        ended = run(words, folder, before)
        if ended.code != 0 and before is not _stop_before_the_end:
            raise RuntimeError(f"{' '.join(words)}: {ended.said}")
    (folder / "done").touch()


def _stop_before_the_end() -> None:
    """The store is left as a kill between its last chunk and its shard leaves it."""
    from rob.common.store.writer import StoreWriter

    StoreWriter._flush = lambda self: os._exit(9) if self._pending else None  # type: ignore[method-assign]


def copy_of(world: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(world, folder, copy_function=shutil.copyfile)


def left_behind(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a command left, less what holds the time of day or says how it was stopped."""
    found: dict[str, Any] = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.name not in (".lock", "train.log", "sweep.log", "checkpoint.pt"):
                found[str(file.relative_to(folder))] = _plain(file)
    return found


def _plain(file: Path) -> Any:
    if file.name == "metrics.jsonl":
        timed = ("images_per_second", "data_wait", "shares", "crc32c")
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in file.read_text().splitlines()]
    if file.name == "new.json":  # of compare
        return [run["scores"] for run in json.loads(file.read_text())]
    return file.read_bytes()
