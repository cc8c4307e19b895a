"""The prototype cross-entropy, forward and backward: the fused implementations against plain torch, torch.compile and Liger.

    rob bench loss

DINO's work by default: every image has 10 student views and 2 targets, same-view pairs skipped, 256 dimensions; on a GPU 256
images and 65,536 prototypes under bfloat16 autocast, on a CPU 64 and 16,384 in float32. The sides take turns, round by round,
so that the machine's noise falls on all alike, and their losses and gradients must agree before the times count.

``extra_mb`` is what a side's forward and backward hold at their peak beside the inputs and the two gradients that every side
has to return. On CUDA the allocator counts it. On a CPU each side runs in a process of its own: the growth of its resident
memory over a second step, as the kernel counts it, scratch of the matrix library included.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rob.benchmarks.report import Report, parts
from rob.common.run import pick_device
from rob.student_train.kernels import (
    DenseTarget,
    EmbeddingTarget,
    Target,
    TopKTarget,
    prototype_cross_entropy,
    reference,
)

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
MB = 1e6
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossConfig:
    """None stands for the device's own: 256 images and 65,536 prototypes on CUDA, 64 and 16,384 elsewhere."""

    images: int | None = None
    prototypes: int | None = None
    views: int = 10
    targets: int = 2
    dim: int = 256
    kind: str = "embedding"  # or "topk" (64 of K), "dense"
    rounds: int = 15
    compile: bool = True
    device: str = "auto"

    def resolved(self, device: torch.device) -> "LossConfig":
        images, prototypes = (256, 65536) if device.type == "cuda" else (64, 16384)
        return LossConfig(
            **{**asdict(self), "images": self.images or images, "prototypes": self.prototypes or prototypes}
        )


@dataclass(frozen=True, eq=False)
class Work:
    """One batch, the same for every side."""

    embedding: Tensor  # (B, V, D)
    prototypes: Tensor  # (K, D)
    teacher: EmbeddingTarget
    target: Target
    pair_weights: Tensor  # (V, G)

    @classmethod
    def of(cls, config: LossConfig, device: torch.device) -> "Work":
        assert config.images and config.prototypes
        torch.manual_seed(0)

        def unit(*shape: int) -> Tensor:
            return normalize(torch.randn(*shape, device=device), dim=-1)

        embedding = unit(config.images, config.views, config.dim).requires_grad_()
        prototypes = unit(config.prototypes, config.dim).requires_grad_()
        teacher = EmbeddingTarget(unit(config.images, config.targets, config.dim), unit(config.prototypes, config.dim))
        weights = 1 - torch.eye(config.views, config.targets, device=device)
        return cls(embedding, prototypes, teacher, _target(teacher, config.kind), weights / weights.sum())


def _target(teacher: EmbeddingTarget, kind: str) -> Target:
    if kind == "embedding":
        return teacher
    logits = teacher.embedding @ teacher.matrix.T
    if kind == "dense":
        return DenseTarget(logits.half())
    largest, ids = logits.topk(64, dim=2)
    temps = (0.04, 0.07)
    rest = logits.scatter(2, ids, -torch.inf)
    tail = torch.stack([torch.logsumexp(rest / temp, dim=2) for temp in temps], dim=2)
    return TopKTarget(ids, largest.half(), tail, temps, logits.shape[2])


# ==== the sides ====


def sides(config: LossConfig, work: Work, device: torch.device) -> dict[str, Loss]:
    """What each side computes from (embedding, prototypes)."""

    def eager(embedding: Tensor, prototypes: Tensor) -> Tensor:
        return reference.prototype_cross_entropy(
            embedding, prototypes, work.target, STUDENT_TEMP, TEACHER_TEMP, None, work.pair_weights
        )

    def ours(impl: str) -> Loss:
        return lambda embedding, prototypes: prototype_cross_entropy(
            embedding,
            prototypes,
            work.target,
            student_temp=STUDENT_TEMP,
            teacher_temp=TEACHER_TEMP,
            pair_weights=work.pair_weights,
            impl=impl,
        )

    found: dict[str, Loss] = {"reference": eager}
    if config.compile:
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    found["chunked"] = ours("chunked")
    if device.type == "cuda":
        found["triton"] = ours("triton")
        if find_spec("liger_kernel") and config.kind == "embedding":
            found["liger"] = liger(work)
    return found


def liger(work: Work) -> Loss:
    """Liger's fused linear JSD at beta 0, KL(q, p): one row a pair, since it shares no target among an image's views.

    The temperatures go into its two inputs. KL differs from the cross-entropy by the target's entropy, and not in its gradients.
    """
    from liger_kernel.ops import LigerFusedLinearJSDFunction  # type: ignore[import-not-found]

    views, targets = work.pair_weights.nonzero(as_tuple=True)
    teacher = (work.teacher.embedding[:, targets] / TEACHER_TEMP).flatten(0, 1)

    def loss(embedding: Tensor, prototypes: Tensor) -> Tensor:
        student = (embedding[:, views] / STUDENT_TEMP).flatten(0, 1)
        half = torch.bfloat16  # as autocast does for the others
        divergence = LigerFusedLinearJSDFunction.apply(
            student.to(half), prototypes.to(half), teacher.to(half), work.teacher.matrix.to(half), None, 0.0
        )
        assert isinstance(divergence, Tensor)
        return divergence

    return loss


def step(loss: Loss, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and backward: the loss and the two gradients."""
    work.embedding.grad = work.prototypes.grad = None
    cuda = work.embedding.is_cuda
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        value = loss(work.embedding, work.prototypes)
    value.backward()
    assert work.embedding.grad is not None and work.prototypes.grad is not None
    return value.detach(), work.embedding.grad, work.prototypes.grad


def agree(sides: dict[str, Loss], work: Work) -> None:
    """Raises AssertionError unless all sides give the reference's loss and gradients."""
    tolerance = 5e-2 if work.embedding.is_cuda else 1e-4
    expected = step(sides["reference"], work)
    for name, loss in sides.items():
        for what, found, truth in zip(("loss", "embedding", "prototypes"), step(loss, work), expected, strict=True):
            off = float((found - truth).norm() / truth.norm())
            assert off < tolerance or (name, what) == ("liger", "loss"), f"{name}: {what} differs by {off:.1e}"


# ==== measuring ====


def extra_bytes(name: str, loss: Loss, config: LossConfig, work: Work) -> int | None:
    """Peak memory of one step beside its inputs and gradients; None where the system does not count it."""
    gradients = work.embedding.nbytes + work.prototypes.nbytes
    if work.embedding.is_cuda:
        step(loss, work)
        work.embedding.grad = work.prototypes.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, work)
        return torch.cuda.max_memory_allocated() - before - gradients
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "rob.benchmarks.loss", name, json.dumps(asdict(config))]
    grown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return grown - gradients


def resident_growth(name: str, config: LossConfig) -> int:
    """Bytes by which this process' resident memory peaks above where it stood, over the second step of one side."""
    device = torch.device("cpu")
    work = Work.of(config, device)
    loss = sides(config, work, device)[name]
    step(loss, work)
    work.embedding.grad = work.prototypes.grad = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the first step freed is no longer resident
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    step(loss, work)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's queue empty at both ends."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def matmul_rate(device: torch.device) -> float:
    """FLOPs a second of a large square product in the dtype that the sides use: the best of several."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(8))


def floor_flops(config: LossConfig) -> int:
    """Of the products that no way around is known for: three for each student row, one for each row of an embedding target."""
    assert config.images and config.prototypes
    rows = 3 * config.views + (config.targets if config.kind == "embedding" else 0)
    return 2 * config.images * rows * config.prototypes * config.dim


def run(config: LossConfig = LossConfig()) -> Report:
    """Raises AssertionError when two sides differ: then they did not do the same work."""
    device = pick_device(config.device)
    config = config.resolved(device)
    work = Work.of(config, device)
    losses = sides(config, work, device)
    agree(losses, work)

    seconds: dict[str, list[float]] = {name: [] for name in losses}
    rates = []
    for _ in parts(range(config.rounds)):
        rates.append(matmul_rate(device))
        for name, loss in losses.items():
            seconds[name].append(seconds_of(partial(step, loss, work), device))
    extra = {name: extra_bytes(name, loss, config, work) for name, loss in losses.items()}
    floor = floor_flops(config) / median(rates)

    def faster(side: str, other: str) -> float | None:
        """Median over the rounds of the two sides' times in the same round."""
        if other not in seconds:
            return None
        return median(a / b for a, b in zip(seconds[side], seconds[other], strict=True))

    best = "triton" if device.type == "cuda" else "chunked"
    ours, eager = extra[best], extra["reference"]
    ratios = {
        "time_vs_eager": faster(best, "reference"),
        "time_vs_compile": faster(best, "torch.compile"),
        "time_vs_liger": faster(best, "liger"),
        "memory_vs_eager": ours / eager if ours is not None and eager else None,
        "of_floor": floor / median(seconds[best]),
    }
    rows = [
        {
            "side": name,
            "seconds": median(taken),
            "fastest": min(taken),
            "slowest": max(taken),
            "extra_mb": None if (held := extra[name]) is None else held / MB,
            "of_floor": floor / median(taken),
        }
        for name, taken in seconds.items()
    ]
    described = {**asdict(config), "ours": best, "matmul_gflops": median(rates) / 1e9, "floor_seconds": floor}
    described["gradients_mb"] = (work.embedding.nbytes + work.prototypes.nbytes) / MB
    return Report.of("loss", device, described, rows, ratios)


if __name__ == "__main__":
    if len(sys.argv) > 1:  # in a process of its own, for extra_bytes
        print(resident_growth(sys.argv[1], LossConfig(**json.loads(sys.argv[2]))))
    else:
        report = run()
        report.show()
        print(report.write())
