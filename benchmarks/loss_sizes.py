"""The prototype cross-entropy on a GPU, size by size: how exact every implementation is, how fast, and what its parts cost.

Forward and backward of 256 images x 10 student views against 2 embedding targets, same-view pairs skipped, under bfloat16
autocast. Every implementation runs by itself: what one raises stands in its row. The command is ``loss_gpu.py``.
"""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rob.benchmarks.loss import LossConfig, Work, floor_flops, liger, step
from rob.student_train.kernels import EmbeddingTarget, prototype_cross_entropy, reference

Loss = Callable[[Tensor, Tensor], Tensor]
Size = tuple[int, int]
"""Prototypes and dimensions."""

SIZES: tuple[Size, ...] = (
    (65536, 256), (4096, 256), (65536, 384), (262144, 256), (65536, 2048), (16384, 256), (65536, 1024), (4096, 384),
    (262144, 384), (4096, 2048), (4096, 1024), (262144, 1024), (262144, 2048),
)  # fmt: skip
"""The most wanted first: the time may end."""

LIGER: tuple[Size, ...] = SIZES[:2]
"""Sizes at which Liger is measured: by rows of 32, it takes ten times as long as all others together."""

COMPILED: tuple[Size, ...] = ((65536, 256), (4096, 256))
"""Sizes at which torch.compile is tried: it takes its time to begin."""

LIMIT = 2e-2
"""Of the errors of loss and gradients against float64, relative to their norm, with operands that bfloat16 holds exactly."""

CHECKED_IMAGES = 16
REPEATS = 20


def make_work(size: Size, images: int, device: torch.device) -> Work:
    """Random unit rows, rounded to what bfloat16 holds."""
    k, d = size
    work = Work.of(LossConfig(images=images, prototypes=k, dim=d), device)
    with torch.no_grad():
        for rows in (work.embedding, work.prototypes, work.teacher.embedding, work.teacher.matrix):
            rows.copy_(rows.bfloat16())
    return work


def sides(work: Work, compiled: bool = False) -> dict[str, Loss]:
    """What each implementation computes from (embedding, prototypes), ours first; or torch.compile alone."""
    from rob.benchmarks.loss import STUDENT_TEMP, TEACHER_TEMP

    def ours(impl: str) -> Loss:
        return lambda embedding, prototypes: prototype_cross_entropy(
            embedding, prototypes, work.target, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP,
            pair_weights=work.pair_weights, impl=impl,
        )  # fmt: skip

    def eager(embedding: Tensor, prototypes: Tensor) -> Tensor:
        return reference.prototype_cross_entropy(
            embedding, prototypes, work.target, STUDENT_TEMP, TEACHER_TEMP, None, work.pair_weights
        )

    found: dict[str, Loss] = {}
    if work.embedding.is_cuda and find_spec("triton"):
        found["triton"] = ours("triton")
    found["chunked"] = ours("chunked")
    found["eager"] = eager
    if work.embedding.is_cuda and tuple(work.prototypes.shape) in LIGER and find_spec("liger_kernel"):
        found["liger"] = liger(work)
    return {"torch.compile": torch.compile(eager, dynamic=False)} if compiled else found


# ==== one side at one size ====


def errors(loss: Loss, work: Work) -> list[float]:
    """Of loss and both gradients, relative to the norm of what float64 gives."""
    from rob.benchmarks.loss import STUDENT_TEMP, TEACHER_TEMP

    embedding, prototypes = (t.detach().double().requires_grad_() for t in (work.embedding, work.prototypes))
    target = EmbeddingTarget(work.teacher.embedding.double(), work.teacher.matrix.double())
    truth = reference.prototype_cross_entropy(
        embedding, prototypes, target, STUDENT_TEMP, TEACHER_TEMP, None, work.pair_weights.double()
    )
    truth.backward()
    assert embedding.grad is not None and prototypes.grad is not None
    exact = truth.detach(), embedding.grad, prototypes.grad
    poison(work.embedding.device)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(step(loss, work), exact, strict=True)]


def poison(device: torch.device) -> None:
    """What the allocator hands out next is full of NaN, so that what is not written shows."""
    if device.type == "cuda":
        torch.full((1 << 26,), torch.nan, device=device)


def times(
    work: Callable[[], object], device: torch.device, repeats: int = REPEATS, seconds: float = 1.0
) -> dict[str, float]:
    """Milliseconds of a call: ``ms``, the median by the device's own events, ``fastest_ms``, and ``host_ms`` to launch it.
    Calls follow one another without a wait, as they do in training."""
    work()
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        taken = 1e3 * (time.perf_counter() - start)
        return {"ms": taken, "fastest_ms": taken, "host_ms": taken}
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    repeats = max(3, min(repeats, int(seconds / max(1e-6, time.perf_counter() - start))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    start = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    host = 1e3 * (time.perf_counter() - start) / repeats
    torch.cuda.synchronize(device)
    taken = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return {"ms": median(taken), "fastest_ms": min(taken), "host_ms": host}


def product_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOPs a second of a large square product of random numbers."""
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2e3 * size**3 / times(lambda: torch.mm(a, b), device)["ms"]


def extra_mb(loss: Loss, work: Work) -> float | None:
    """What a step holds at its peak beside its inputs and the two gradients."""
    if not work.embedding.is_cuda:
        return None
    work.embedding.grad = work.prototypes.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, work)
    held = torch.cuda.max_memory_allocated() - before - work.embedding.nbytes - work.prototypes.nbytes
    return held / 1e6


# ==== what others call ====


def measure_losses(
    sizes: Sequence[Size] = SIZES,
    seconds: float = 75.0,
    device: torch.device | None = None,
    images: int = 256,
    said: Callable[[dict[str, Any]], None] = lambda row: None,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """A row a size and implementation: errors, times, share of the floor, memory; ``error`` where it raised. ``said`` gets each
    row at once. Stops at the first row that would begin after ``seconds``."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    ends, rows = time.perf_counter() + seconds, []
    rate = product_rate(device)
    for size in sizes:
        config = LossConfig(images=images, prototypes=size[0], dim=size[1])
        floor = 1e3 * floor_flops(config) / rate
        names: list[str] = []
        while True:
            if time.perf_counter() > ends:
                return rows
            row: dict[str, Any] = {"prototypes": size[0], "width": size[1], "floor_ms": floor}
            try:
                done = _next_row(row, names, size, images, device, compiled)
            except Exception as error:
                row["error"], done = brief(error), "impl" not in row
            if not done or "error" in row:
                rows.append(row)
                said(row)
            free(device)
            if done:
                break
    return rows


def _next_row(
    row: dict[str, Any], names: list[str], size: Size, images: int, device: torch.device, compiled: bool
) -> bool:
    """Fill the row of the first side that is not in ``names``, and name it there; True when there is none left."""
    small = make_work(size, min(images, CHECKED_IMAGES), device)
    losses = sides(small, compiled)
    name = next((name for name in losses if name not in names), None)
    if name is None:
        return True
    names.append(name)
    row["impl"] = name
    if not compiled:  # which another shape would set off again
        off = errors(losses[name], small)
        row["errors"] = off
        row["exact"] = max(off[1:] if name == "liger" else off) < LIMIT
    del small, losses
    work = make_work(size, images, device)
    loss = sides(work, compiled)[name]
    row |= times(partial(step, loss, work), device)
    row["of_floor"] = row["floor_ms"] / row["ms"]
    row["extra_mb"] = extra_mb(loss, work)
    return False


def measure_parts(size: Size = SIZES[0], images: int = 256, device: torch.device | None = None) -> list[dict[str, Any]]:
    """What the fused forms are made of, each by itself: milliseconds and TFLOP/s."""
    from rob.student_train.kernels import products, triton_kernels
    from rob.student_train.kernels.triton_ce import Scores

    device = device or torch.device("cuda", torch.cuda.current_device())
    work = make_work(size, images, device)
    z, p = work.embedding.detach().flatten(0, 1).bfloat16(), work.prototypes.detach().bfloat16()
    (rows, d), k = z.shape, len(p)
    e = z.new_empty(rows, k)
    sums, log_sums = torch.zeros(2, rows, device=device)
    longest = torch.linalg.vector_norm(p, dim=1, dtype=torch.float32).max()
    logits_rows = max(64, min(rows, (64 << 20) // (4 * k)))
    logits = torch.randn(logits_rows, k, device=device)
    unit = 2 * rows * k * d

    def with_parts(parts: int) -> Callable[[], object]:
        def run() -> None:
            kept, products.parts_of = products.parts_of, lambda *_: parts
            try:
                products.long_product(e, p)
            finally:
                products.parts_of = kept

        return run

    def with_config(config: Any) -> Callable[[], object]:
        own = triton_kernels.launcher([config])

        def run() -> None:
            kept, triton_kernels.launch = triton_kernels.launch, own
            try:
                triton_kernels.exponentials(z, p, None, log_sums, 14.4, e)
            finally:
                triton_kernels.launch = kept

        return run

    parts: dict[str, tuple[Callable[[], object], int]] = {
        "cast of the prototypes": (lambda: work.prototypes.detach().bfloat16(), 0),
        "longest prototype": (lambda: torch.linalg.vector_norm(p, dim=1, dtype=torch.float32).max(), 0),
        "exponentials": (lambda: triton_kernels.exponentials(z, p, None, log_sums, 14.4, e), unit),
        "fill, tiled": (lambda: Scores(p, longest, None, 0.1, True).fill(z, e, sums, log_sums), unit),
        "fill, library": (lambda: Scores(p, None, None, 0.1, False).fill(z, e, sums, log_sums), unit),
        "logits by the library, one block, float32": (
            lambda: products.product(z[:logits_rows], p.T),
            unit * logits_rows // rows,
        ),
        "logits by the library, all, bfloat16": (lambda: torch.mm(z, p.T, out=e), unit),
        "softmax_rows, one block": (
            lambda: triton_kernels.softmax_rows(logits, None, 1.0, e[:logits_rows], sums, log_sums),
            0,
        ),
        "e^T R": (lambda: products.product(e.T, z), unit),
        "e P": (lambda: products.long_product(e, p), unit),
    }
    parts |= {f"e P in {n} parts": (with_parts(n), unit) for n in (1, 2, 4, 8, 16) if k % (8 * n) == 0}
    if device.type == "cuda":
        parts |= {f"exponentials, {config}": (with_config(config), unit) for config in triton_kernels.CONFIGS}
    found = []
    for name, (run, flops) in parts.items():
        row: dict[str, Any] = {"prototypes": k, "width": d, "part": name}
        try:
            row["ms"] = times(run, device, seconds=0.3)["ms"]
            row["tflops"] = flops / row["ms"] / 1e9
        except Exception as error:
            row["error"] = brief(error)
        found.append(row)
    return found


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
