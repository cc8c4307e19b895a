"""What every run needs first: a device, a precision, a seed, and the versions it ran with."""

import os
import platform
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from .errors import MisuseError, unknown_name

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: ``rank`` of ``world_size``, on GPU ``local_rank`` of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The process group that torchrun's environment describes, joined; alone without it. NCCL between GPUs, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank)


def left_together(ranks: Ranks) -> AbstractContextManager[list[int]]:
    """`uninterrupted` where there are other ranks, which would wait in vain for one that leaves: `stop_together` ends them."""
    return nullcontext([]) if ranks.world_size == 1 else uninterrupted()


def stop_together(held_back: list[int], ranks: Ranks) -> None:
    """KeyboardInterrupt on all ranks when signals are ``held_back`` on one: else those that go on wait for it in vain.

    A collective of all ranks, on their CPUs: no GPU is waited for.
    """
    if ranks.world_size == 1:
        return
    signals = torch.tensor(len(held_back))
    torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
    if signals:
        raise KeyboardInterrupt


def leave_ranks() -> None:
    """End what ``join_ranks`` joined: NCCL warns about a process that does not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one, else the CPU), or a torch device name. CUDA without a number is this rank's GPU. The
    GPU becomes the current one, which Triton launches on. Raises MisuseError when it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name("device", name, DEVICES) from None
    if device.type not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MisuseError(
            f"--device {name}: torch finds no CUDA device here; use --device cpu, or check the driver with nvidia-smi"
        )
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise MisuseError(
                f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0"
            )
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MisuseError("--device mps: torch finds no Apple GPU here; use --device cpu")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context to run a network in. Raises MisuseError for an unknown precision, and for fp16 on a CPU."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    dtype = PRECISIONS[precision]
    if dtype is None:
        return nullcontext()
    if dtype == torch.float16 and device.type == "cpu":
        raise MisuseError("--precision fp16 needs a GPU: on a CPU use fp32, or bf16 where the processor has it")
    return torch.autocast(device.type, dtype)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's global generators: network initialisation and drop-path. Views do not use them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, rank: int, step: int) -> None:
    """``seed_everything`` before step ``step`` of rank ``rank``: what it draws depends on these three alone, so that ranks drop
    different paths and a resumed run draws what an uninterrupted one does."""
    seed_everything(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0]))


ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""A cluster's or a container's way to end a job, and a terminal's that is closed."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside the block each of ``ENDINGS`` is a Ctrl-C; the process then exits with 128 and the signal's number. One that is
    ignored (nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    process, received = os.getpid(), []

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != process:  # a forked worker has nothing to save
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    handled = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    except KeyboardInterrupt:
        if received:
            sys.exit(128 + received[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Holds Ctrl-C and ``ENDINGS`` back until the end of the block, so that what is inside happens wholly or not at all.

    Yields the signals held back so far; a KeyboardInterrupt that the block raises for them becomes the first of them.
    """
    held_back: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield held_back
        return
    before = {
        number: signal.signal(number, lambda number, _: held_back.append(number))
        for number in (signal.SIGINT, *ENDINGS)
    }
    try:
        yield held_back
    except KeyboardInterrupt:
        if not held_back:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held_back:
        signal.raise_signal(held_back[0])


def versions(*packages: str) -> dict[str, str]:
    """Python's and the packages' versions; a package that is not installed is ``absent``."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
