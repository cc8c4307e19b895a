"""What every run needs first: a device, a precision, a seed, and the versions it ran with."""

import os
import platform
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor

from .errors import MisuseError, unknown_name
from .heap import kept_bytes

DEVICES = ("auto", "cpu", "cuda", "mps")
AMPERE = 8, 0
"""The compute capability from which on a GPU multiplies bfloat16 fast."""
ALGORITHMS = 3
"""That cuDNN tries for a shape, the likeliest first. With torch's ten, a MobileNet's first steps took tens of seconds on an H200,
in which the CPU had little to do."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
            f"`device` {name}: torch finds no CUDA device here; use `device` cpu, or check the driver with nvidia-smi"
        )
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise MisuseError(
                f"`device` {device}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0"
            )
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MisuseError("`device` mps: torch finds no Apple GPU here; use `device` cpu")
    return device


def use_device(device: torch.device | None) -> None:
    """Make a GPU the current one of this thread. A thread starts out on GPU 0, whichever the process is on, and whatever asks
    CUDA there for anything, a stream too, makes a context of half a gigabyte on it."""
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def concrete(device: torch.device) -> torch.device:
    """With a number: ``cuda`` without one is the GPU that this thread is on, and another thread may be on another."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def current_device() -> torch.device | None:
    """The GPU that this thread is on, for the threads that it starts; None before CUDA is used."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may take on ``device``; None where the system does not say. What it keeps for itself and does not
    use, as after a trial, is free too."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
            return available + kept_bytes()
    except (OSError, StopIteration):
        return None


def choose_precision(device: torch.device, precision: str) -> str:
    """What ``auto`` stands for on ``device``: bf16 on GPUs of compute capability 8 and up, fp32 elsewhere. MisuseError: an
    unknown one."""
    if precision not in ("auto", *PRECISIONS):
        raise unknown_name("precision", precision, ("auto", *PRECISIONS))
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE else "fp32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor computes with bfloat16 (AVX-512 or AMX)."""
    if device.type != "cpu":
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def pixel_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What views are written in: on CUDA what autocast would turn them into before the first layer, else float32."""
    return PRECISIONS[choose_precision(device, precision)] or torch.float32 if device.type == "cuda" else torch.float32


def allow_fast_arithmetic(device: torch.device, precision: str) -> None:
    """On CUDA: cuDNN tries its likeliest algorithms once a shape, of which a run has few; and unless fp32 was asked for by name,
    what is left in float32 beside a network in half precision may be multiplied as TF32."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, ALGORITHMS
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


@contextmanager
def tuning(allowed: bool) -> Iterator[None]:
    """Inside, where it is not ``allowed``, cuDNN takes the algorithm that it expects to be fastest and tries none: for shapes
    that do not come again."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and allowed
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def float64(x: Tensor) -> Tensor:
    """``x`` in double precision, on the CPU where its device has none: Apple's GPUs."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 products are float32's on a GPU, too, whatever a run allows itself otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context to run a network in. Raises MisuseError for an unknown precision, and for fp16 on a CPU."""
    precision = choose_precision(device, precision)
    dtype = PRECISIONS[precision]
    if dtype is None:
        return nullcontext()
    if dtype == torch.float16 and device.type == "cpu":
        raise MisuseError("`precision` fp16 needs a GPU: on a CPU use fp32, or bf16 where the processor has it")
    return torch.autocast(device.type, dtype)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's global generators: network initialisation and drop-path. Views do not use them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Where there is no GPU, torch would keep the seed for one all the same, with the stack that it came from: .5 ms, every step.
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)


def seed_step(seed: int, rank: int, step: int) -> None:
    """``seed_everything`` before step ``step`` of rank ``rank``: what it draws depends on these three alone, so that ranks drop
    different paths and a resumed run draws what an uninterrupted one does."""
    seed_everything(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0]))


def versions(*packages: str) -> dict[str, str]:
    """Python's and the packages' versions; a package that is not installed is ``absent``."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
