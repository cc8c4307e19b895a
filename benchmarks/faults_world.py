"""The small world of ``faults.py``: images, a store, a run; and commands in processes forked from one that has imported all."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

PATIENCE = 600.0
"""Seconds after which a command hangs: many, since other work on the machine is not its fault."""
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
CACHING = ("--teacher", TEACHER, "--checkpoint", "teacher.safetensors", "--view-size", "32", "--views", "2", *FAST)


@dataclass(frozen=True)
class Command:
    """The ``words`` of a command line; the files and folders that it ``leaves``; of how many ``ranks`` it is, and whether
    torchrun starts them, with its own options; whether its store is to have ``small_shards``, of 16 images."""

    words: tuple[str, ...]
    leaves: tuple[str, ...] = ("new",)
    ranks: int = 1
    torchrun: tuple[str, ...] | None = None
    small_shards: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The names in the world among its words."""
        return tuple(word for word in self.words[1:] if word in ("images", "data.beton", "targets.zarr", "run"))


COMMANDS = {
    "pack": Command(("pack", "images", "new.beton", "--workers", "1"), ("new.beton", "new.beton.json")),
    "cache": Command(("cache-teacher", "data.beton", "new.zarr", *CACHING), ("new.zarr",)),
    "train cached": Command(("train-student", *CACHED, "--out", "new")),
    "train momentum": Command(("train-student", *MOMENTUM, "--out", "new")),
    "train, 2 ranks": Command(("train-student", *CACHED, "--out", "new"), ranks=2),
    "eval knn": Command(("eval", "knn", "run", *KNN, "--out", "new")),
    "export": Command(("export", "run", "--to", "onnx", "--data", "data.beton", "--out", "new")),
    "embed": Command(("embed", "run", "data.beton", "new.npy", *FAST), ("new.npy", "new.csv")),
    "sweep": Command(("sweep", "new", "--vary", "seed=1,2", "--device", "cpu", "--", *CACHED[:-2])),
}
TRAINED = COMMANDS["train, 2 ranks"]
LAUNCHED = {
    "torchrun": Command(TRAINED.words, ranks=2, torchrun=()),
    "torchrun --max-restarts 1": Command(TRAINED.words, ranks=2, torchrun=("--max-restarts", "1")),
}
HALF = Command(("cache-teacher", "data.beton", "half.zarr", *CACHING), ("half.zarr",))
SWEEP = ("sweep", "sweep", *COMMANDS["sweep"].words[2:])
RESUMED = ("train-student", *CACHED, "--out", "run")
RUN_KNN, PIXELS = ("eval", "knn", "run", *KNN), Command(("eval", "knn", "pixels", *KNN, "--out", "new"))
EXPORT = ("export", "run", "--to", "onnx", "--data", "data.beton")
COMPARE = Command(("compare", "run", "--out", "new.png"), ("new.json",))

FILES = {
    "packed images": ("data.beton", PIXELS),
    "manifest of images": ("data.beton.json", PIXELS),
    "manifest of a store": ("targets.zarr/zarr.json", COMMANDS["train cached"]),
    "chunks of a store": ("targets.zarr/embedding/c/0/0/0", COMMANDS["train cached"]),
    "sums of a store": (
        "targets.zarr/statistics/embedding_sum/c/0",
        Command(("check", "targets.zarr"), ("targets.zarr",)),
    ),
    "journal": ("half.zarr/pending/chunk-00000000.npz", HALF),
    "manifest of a journal": ("half.zarr/pending/manifest.json", HALF),
    "checkpoint": ("run/checkpoint.pt", Command(RESUMED, ("run/student.safetensors",))),
    "weights": ("run/student.safetensors", COMMANDS["eval knn"]),
    "kept features": ("run/eval/features/*/000000000.safetensors", Command(RUN_KNN, ("run/eval",))),
    "result": ("run/eval/knn.json", COMPARE),
    "outcome": ("run/outcome.json", Command(("check", "run"), ("run",))),
    "log": ("run/metrics.jsonl", Command(RESUMED, ("run/metrics.jsonl",))),
    "configuration": ("run/config.json", Command(RESUMED, ("run/student.safetensors",))),
    "exported ONNX": ("run/student.onnx", Command(("eval", "knn", "run/student.onnx", *KNN, "--out", "new"))),
    "export.json": ("run/export.json", COMPARE),
    "sweep's record": (
        "sweep/seed=1/sweep.json",
        Command(SWEEP, ("sweep/sweep.json",)),
    ),
}
"""Kind of file -> the file, and the command that reads it."""


# ==== commands in forked processes ====


@dataclass(frozen=True)
class Ended:
    code: int | None
    """None: it hung, and was killed."""
    said: str
    """By torchrun's ranks, not by torchrun, whose tracebacks are its own."""
    launched: bool = False

    @property
    def outcome(self) -> str:
        if self.code is None:
            return "hung"
        crashed = -(self.code or 0) in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
        wordless = 0 < self.code < 128 and "error:" not in self.said and not self.launched
        if "Traceback (most recent call last)" in self.said or crashed or wordless:
            return "traceback"
        return "same" if self.code == 0 else "told"


@dataclass(frozen=True)
class Running:
    process: int
    logs: Path
    """A file, or the folder in which torchrun keeps one a rank."""

    def wait(self, seconds: float = PATIENCE) -> Ended:
        end, code = time.monotonic() + seconds, None
        while code is None and time.monotonic() < end:
            done, status = os.waitpid(self.process, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0 if done else 0.01)
        if code is None:
            for process in (*self.children(), self.process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        launched = self.logs.name == "ranks"
        files = sorted(self.logs.rglob("*.log")) if launched else [self.logs]
        return Ended(code, "".join(file.read_text(errors="replace") for file in files if file.exists()), launched)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)

    def children(self) -> list[int]:
        """Of torchrun: its ranks."""
        try:
            return [
                int(word) for word in Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()
            ]
        except OSError:
            return []


def start(command: Command, folder: Path, logs: Path) -> list[Running]:
    """The forked ranks of a command in ``folder``, or its torchrun; what they say goes to ``logs``."""
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    port = free_port()
    if command.torchrun is not None:
        options = ("--nproc-per-node", str(command.ranks), "--master-port", str(port), *command.torchrun)
        kept = ("--redirects", "3", "--log-dir", str(logs / "ranks"))
        words = (sys.executable, "-m", "torch.distributed.run", *options, *kept, "-m", "rob", *command.words)
        return [Running(_forked(lambda: os.execv(words[0], words), folder, logs / "torchrun"), logs / "ranks")]
    started = []
    for rank in range(command.ranks):
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": command.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = {name: str(value) for name, value in told.items()} if command.ranks > 1 else {}
        log = logs / f"{rank}"
        started.append(
            Running(_forked(lambda told=environment: _rob(command.words, told, command.small_shards), folder, log), log)
        )
    return started


def run(command: Command, folder: Path, logs: Path) -> list[Ended]:
    return [running.wait() for running in start(command, folder, logs)]


def _rob(words: Sequence[str], environment: dict[str, str], small_shards: bool = False) -> None:
    from rob.cli import main

    os.environ.update(environment)
    if small_shards:
        from rob.teacher_cache import asked

        asked.StoreManifest = partial(asked.StoreManifest, chunk_rows=8, shard_chunks=2)
    sys.argv = ["rob", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


def _forked(do: Callable[[], None], folder: Path, log: Path) -> int:
    process = os.fork()
    if process:
        return process
    os.chdir(folder)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command begins: this script's frames are not its own
    return _ended(do)


def _ended(do: Callable[[], None]) -> NoReturn:
    """This process does it, and ends as Python would."""
    code = 1
    try:
        do()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        while signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # the command has ended: what comes now is not for it
            with contextlib.suppress(KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ==== a small file system for each trial ====

CLONE_NEWNS = 0x20000


def own_mounts() -> bool:
    """Whether this process may mount file systems; what it then mounts, nobody else sees, and it ends with it."""
    if sys.platform != "linux" or os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    return mount("--make-rprivate", "/")


def mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode == 0


def empty_folder(folder: Path, mounts: bool) -> Path:
    """On a file system of its own in memory, where that may be mounted."""
    if mounts:
        while folder.is_mount():
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)):
            raise RuntimeError(f"{folder}: no tmpfs")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def room_left(folder: Path, size: int) -> None:
    """The file system of ``folder`` gets ``size`` bytes more than are used."""
    used = os.statvfs(folder)
    held = (used.f_blocks - used.f_bfree) * used.f_frsize
    mount("-o", f"remount,size={held + max(size, 4096)}", str(folder))


# ==== the world, and what is compared ====


def make_world(folder: Path, small: bool = False) -> None:
    """Images, a teacher, a store, the same in a bucket, a half-written one, a run with a result; an exported file and a sweep,
    unless ``small``."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps: Iterable[tuple[Command, Callable[[], None]]] = (
        (Command(("pack", "images", "data.beton", "--workers", "1")), _draw),
        (Command(("cache-teacher", "data.beton", "targets.zarr", *CACHING)), lambda: None),
        (HALF, _stop_before_the_end),
        *((Command(words), lambda: None) for words in (RESUMED, RUN_KNN)),
        *((Command(words), lambda: None) for words in (() if small else (EXPORT, SWEEP))),
    )
    log = folder.parent / "world.log"
    for command, before in steps:

        def do(words: tuple[str, ...] = command.words, before: Callable[[], None] = before) -> None:
            before()
            _rob(words, {})

        ended = Running(_forked(do, folder, log), log).wait()
        if ended.code != 0 and command is not HALF:
            raise RuntimeError(f"{' '.join(command.words)}: {ended.said}")
    shutil.copytree(folder / "targets.zarr", folder / "bucket" / "targets.zarr")
    (folder / "done").touch()


def _draw() -> None:
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    for row in range(51):  # from 50 on a run says whether it worked
        coarse = np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = Path("images") / f"class{row % 3}" / f"{row:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path, quality=92)
    torch.manual_seed(0)
    save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), "teacher.safetensors")


def _stop_before_the_end() -> None:
    """The store is left as a kill between its last chunk and its shard leaves it."""
    from rob.common.store.writer import StoreWriter

    StoreWriter._flush = lambda self: os._exit(9) if self._pending else None  # type: ignore[method-assign]


def copy_into(folder: Path, world: Path) -> None:
    shutil.copytree(world, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)


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
    with contextlib.suppress(ValueError):  # damaged
        return _less_times(file)
    return file.read_bytes()


def _less_times(file: Path) -> Any:
    if file.name == "metrics.jsonl":
        timed = ("images_per_second", "data_wait", "shares", "crc32c")
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in file.read_text().splitlines()]
    if file.name == "new.json":  # of compare
        return [run["scores"] for run in json.loads(file.read_text())]
    if file.name == "export.json":
        return [{k: v for k, v in one.items() if k != "latency_ms"} for one in json.loads(file.read_text())["files"]]
    return file.read_bytes()
