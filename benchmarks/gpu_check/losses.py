"""The prototype cross-entropy: every implementation against float64, then its time against the floor."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rob.benchmarks.gpu_check.section import Section, poison
from rob.student_train.kernels import DenseTarget, EmbeddingTarget, Target, TopKTarget, prototype_cross_entropy
from rob.student_train.kernels.prototype_ce import IMPLS
from rob.student_train.kernels.reference import prototype_cross_entropy as plain

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
LIMITS = {"bf16": 2e-2, "fp16": 5e-3, "tf32": 5e-3, "fp32": 1e-4}
"""Of the error of loss and gradients, relative to their norm."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def run(section: Section) -> None:
    """The implementations in torch, the tiled one as it is used most, times, the rest: a Triton kernel is compiled for every
    shape that is new to it, and the time may end.
    """
    cuda = section.device.type == "cuda"
    kinds, precisions = ("embedding", "topk", "dense"), tuple(DTYPES) if cuda else ("fp32",)
    for kind, precision in product(kinds, precisions):
        for biased, ragged in ((False, True), (True, True), (False, False)):
            _check(section, kind, precision, biased, ragged, tiled=False)
    for kind in kinds if cuda else ():
        _check(section, kind, "bf16", biased=False, ragged=True, tiled=True)
    sizes = section.size(
        [(64, 16)],
        [(65536, 256), (65536, 384)],
        [(65536, 256), (65536, 384), (4096, 256), (262144, 256), (65536, 1024), (65536, 2048)],
    )
    for k, d in sizes:
        section.measure(f"K {k}, D {d}", lambda k=k, d=d: _times(section, k, d))
    for kind, precision, ragged in product(kinds, precisions, (True, False)) if cuda else ():
        if (precision, ragged) != ("bf16", True):
            _check(section, kind, precision, False, ragged, tiled=True)


# ==== correctness ====


def implementations(biased: bool, precision: str, tiled: bool, device: torch.device) -> list[str]:
    """Those to check. The plain formula rounds its logits to 16 bits, and ``auto`` may choose it: neither is held to float64
    there."""
    if tiled:
        return [] if biased or not find_spec("triton") else ["triton"]
    left_out = {"auto", "reference"} if DTYPES[precision].itemsize == 2 else set()
    return [name for name in IMPLS if name not in left_out | {"triton"}]


def _check(section: Section, kind: str, precision: str, biased: bool, ragged: bool, tiled: bool) -> None:
    if section.left() <= 0:
        return
    name = " ".join(filter(None, [kind, precision, "biased" if biased else "", "ragged" if ragged else ""]))
    device, dtype = section.device, DTYPES[precision]
    images, views, d, k = (3, 2, 16, 40) if section.toy else (13, 5, 100, 1003) if ragged else (64, 10, 256, 4096)
    random = torch.Generator().manual_seed(1)

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=random), dim=-1).to(device, dtype)

    embedding, prototypes = unit(images, views, d), unit(k, d)
    teacher = EmbeddingTarget(unit(images, 2, d), unit(k, d))
    bias = (0.2 * torch.randn(k, generator=random)).to(device, dtype) if biased else None
    centre = (0.1 * torch.randn(k, generator=random)).to(device)
    weights = torch.rand(views, 2, generator=random).to(device) * (1 - torch.eye(views, 2, device=device))
    target = _target(teacher, kind, dtype)
    target64 = _target(EmbeddingTarget(teacher.embedding.double(), teacher.matrix.double()), kind, torch.float64)
    if kind != "embedding":  # the rounding of what is stored is not the loss's
        target64 = _widened(target)

    def outcome(function: Callable[..., Tensor], inputs: list[Tensor | None], target: Target) -> list[Tensor]:
        learned = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
        loss = function(learned[0], learned[1], target, learned[2])
        loss.backward()
        return [loss.detach().double(), *(t.grad.double() for t in learned if t is not None and t.grad is not None)]

    def exact(z: Tensor, p: Tensor, t: Target, b: Tensor | None) -> Tensor:
        return plain(z, p, t, STUDENT_TEMP, TEACHER_TEMP, centre.double(), weights.double(), b)

    inputs = [embedding, prototypes, bias]
    truth = outcome(exact, [None if t is None else t.double() for t in inputs], target64)
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        for impl in implementations(biased, precision, tiled, device):

            def ours(z: Tensor, p: Tensor, t: Target, b: Tensor | None, impl: str = impl) -> Tensor:
                return prototype_cross_entropy(
                    z, p, t, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, centre=centre,
                    pair_weights=weights, student_bias=b, impl=impl,
                )  # fmt: skip

            def compare(impl: str = impl, ours: Callable[..., Tensor] = ours) -> None:
                poison(device, 64 << 20)
                found = outcome(ours, inputs, target)
                off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
                section.check(f"{name}, {impl}: error against float64", off, LIMITS[precision])
                poison(device, 64 << 20)
                again = outcome(ours, inputs, target)
                moved = max(float((a - b).abs().max()) for a, b in zip(found, again, strict=True))
                # What is added up by atomics (a top-k's gradient) may move in the last place, no more.
                scale = max(float(a.abs().max()) for a in found)
                section.check(f"{name}, {impl}: twice the same", moved / scale, 1e-6 if kind == "topk" else 0.0)

            section.attempt(f"{name}, {impl}", compare)
    finally:
        torch.set_float32_matmul_precision(kept)


def _target(teacher: EmbeddingTarget, kind: str, dtype: torch.dtype) -> Target:
    if kind == "embedding":
        return teacher
    logits = teacher.embedding.double() @ teacher.matrix.double().T
    if kind == "dense":
        return DenseTarget(logits.to(dtype))
    k, temps = min(64, logits.shape[2] // 2), (0.04, 0.07)
    largest, ids = logits.topk(k, dim=2)
    rest = logits.scatter(2, ids, -torch.inf)
    tail = torch.stack([torch.logsumexp(rest / temp, dim=2) for temp in temps], dim=2)
    return TopKTarget(ids, largest.to(dtype), tail.float(), temps, logits.shape[2])


def _widened(target: Target) -> Target:
    match target:
        case DenseTarget():
            return DenseTarget(target.logits.double())
        case TopKTarget():
            return replace(target, logits=target.logits.double(), tail=target.tail.double())
        case _:
            return target


# ==== time ====


def _times(section: Section, k: int, d: int) -> dict[str, object]:
    """Forward and backward of 256 images, 10 views, 2 embedding targets in bfloat16; milliseconds, and the share of the floor."""
    device, images = section.device, section.size(4, 256, 256)
    unit = lambda *shape: normalize(torch.randn(*shape, device=device), dim=-1)  # noqa: E731
    embedding, prototypes = unit(images, 10, d).requires_grad_(), unit(k, d).requires_grad_()
    target = EmbeddingTarget(unit(images, 2, d), unit(k, d))
    weights = 1 - torch.eye(10, 2, device=device)
    weights = weights / weights.sum()

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        embedding.grad = prototypes.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            loss = function(embedding, prototypes)
        loss.backward()

    def eager(z: Tensor, p: Tensor) -> Tensor:
        return plain(z, p, target, STUDENT_TEMP, TEACHER_TEMP, None, weights)

    def ours(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, p: prototype_cross_entropy(
            z, p, target, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, pair_weights=weights, impl=impl
        )

    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"chunked": ours("chunked")}
    if device.type == "cuda" and d <= 256 and find_spec("triton"):
        sides["triton"] = ours("triton")
    if k * images <= 1 << 24:
        sides["eager"] = eager
        if device.type == "cuda" and (k, d) == (65536, 256):
            sides["compile"] = torch.compile(eager, dynamic=False)
    row: dict[str, object] = {}
    seconds: dict[str, float] = {}
    for name, side in sides.items():
        if section.left() <= 0:
            break
        try:
            seconds[name] = section.seconds_of(lambda side=side: step(side), 5, 2)
            row[f"{name}_ms"] = seconds[name] * 1e3
        except Exception as error:
            row[f"{name}_error"] = f"{type(error).__name__}: {str(error)[:200]}"
    rate = _matmul_rate(section)
    floor = 2 * images * (3 * 10 + 2) * k * d / rate
    own = {name: seconds[name] for name in ("chunked", "triton") if name in seconds}
    if own:
        best = min(own, key=lambda name: own[name])
        row["best"], row["of_floor"] = best, floor / own[best]
        section.settings.setdefault("loss", {})[f"{k}x{d}"] = best
    return row


def _matmul_rate(section: Section) -> float:
    side = section.size(64, 8192, 8192)
    a, b = torch.randn(2, side, side, device=section.device, dtype=torch.bfloat16)
    return 2 * side**3 / section.device_seconds_of(lambda: torch.mm(a, b), 5)
