"""The cases in which the fused forms of the prototype cross-entropy must be exact on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rob.benchmarks.loss_sizes import brief, poison
from rob.student_train.kernels import DenseTarget, EmbeddingTarget, Target, TopKTarget, chunked, reference

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}  # float32 is TF32


@dataclass(frozen=True)
class LossCase:
    """Inputs on one device; ``name`` says what they try."""

    name: str
    embedding: Tensor
    prototypes: Tensor
    bias: Tensor | None
    target: Target
    centre: Tensor
    weights: Tensor
    limit: float
    small_chunks: bool = False

    def outcome(self, loss: Callable[..., Tensor]) -> list[Tensor]:
        """The loss and its gradients, in float64."""
        learned = [
            t.detach().clone().requires_grad_() for t in (self.embedding, self.prototypes, self.bias) if t is not None
        ]
        value = loss(*learned[:2], self.target, STUDENT_TEMP, TEACHER_TEMP, self.centre, self.weights, *learned[2:])
        value.backward()
        return [value.detach().double(), *(t.grad.double() for t in learned if t.grad is not None)]

    def wide(self) -> "LossCase":
        """In float64."""
        target = self.target
        floats = {f.name: getattr(target, f.name) for f in fields(target)}
        floats = {n: t.double() for n, t in floats.items() if isinstance(t, Tensor) and t.is_floating_point()}
        own = ("embedding", "prototypes", "bias", "centre", "weights")
        tensors = {name: None if (t := getattr(self, name)) is None else t.double() for name in own}
        return replace(self, target=replace(target, **floats), **tensors)  # type: ignore[type-var]


def cases(device: torch.device) -> Iterator[LossCase]:
    ragged, whole = (13, 5, 100, 1003), (40, 10, 256, 8192)
    for kind in ("embedding", "topk", "dense"):
        yield make(device, kind, whole, torch.bfloat16)
        for dtype in LIMITS:
            yield make(device, kind, ragged, dtype, biased=True)
    yield make(device, "embedding", (16, 4, 2048, 1024), torch.bfloat16, biased=True)
    yield replace(make(device, "embedding", whole, torch.bfloat16), name="in small chunks", small_chunks=True)
    yield replace(
        make(device, "topk", ragged, torch.bfloat16, biased=True), name="topk in small chunks", small_chunks=True
    )
    long = make(device, "embedding", ragged, torch.bfloat16, biased=True)
    lengths = torch.logspace(-1, 2, 13, device=device).view(-1, 1, 1)
    yield replace(long, name="rows of any length", embedding=(long.embedding.float() * lengths).bfloat16(), limit=2e-2)


def make(
    device: torch.device, kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, biased: bool = False
) -> LossCase:
    images, views, d, k = shape
    random = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=random), dim=-1).to(device, dtype)

    embedding, prototypes = unit(images, views, d), unit(k, d)
    target: Target = EmbeddingTarget(unit(images, 2, d), unit(k, d))
    if kind != "embedding":
        logits = target.embedding.float() @ target.matrix.float().T
        largest, ids = logits.topk(min(64, k // 2), dim=2)
        temps, rest = (0.03, 0.05), logits.scatter(2, ids, -torch.inf)
        tail = torch.stack([torch.logsumexp(rest / temp, dim=2) for temp in temps], dim=2)
        target = TopKTarget(ids, largest.to(dtype), tail, temps, k) if kind == "topk" else DenseTarget(logits.to(dtype))
    weights = torch.rand(views, 2, generator=random).to(device) * (1 - torch.eye(views, 2, device=device))
    return LossCase(
        f"{kind}, {str(dtype).removeprefix('torch.')}, {images} x {views} x {d} against {k}{', biased' if biased else ''}",
        embedding,
        prototypes,
        (0.2 * torch.randn(k, generator=random)).to(device, dtype) if biased else None,
        target,
        (0.1 * torch.randn(k, generator=random)).to(device),
        weights / weights.sum(),
        LIMITS[dtype],
    )


def check_losses(device: torch.device | None = None) -> list[str]:
    """A sentence for every case and form that is not exact, gives other bits the second time, or raises."""
    from rob.student_train.kernels import triton_ce

    device = device or torch.device("cuda", torch.cuda.current_device())
    found = []
    kept = torch.get_float32_matmul_precision(), triton_ce.chunk_bytes, triton_ce.LOGITS_BYTES, chunked.FEWEST_ROWS
    torch.set_float32_matmul_precision("high")
    try:
        for case in cases(device):
            if case.small_chunks:
                triton_ce.chunk_bytes, triton_ce.LOGITS_BYTES, chunked.FEWEST_ROWS = lambda device: 1, 1, 60
            for form, tiled in (("triton", True), ("chunked", False)):
                try:
                    truth = case.wide().outcome(reference.prototype_cross_entropy)
                    poison(device)
                    loss = partial(triton_ce.prototype_cross_entropy, tiled=tiled)
                    ours = case.outcome(loss)
                    poison(device)
                    again = case.outcome(loss)
                    off = [float((a - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)]
                    if not max(off) < case.limit:
                        found.append(
                            f"{form}, {case.name}: errors {', '.join(f'{x:.1e}' for x in off)} of {case.limit:g}"
                        )
                    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
                    if not same and not isinstance(case.target, TopKTarget):  # whose rows are added in any order
                        found.append(f"{form}, {case.name}: other bits the second time")
                except Exception as error:
                    found.append(f"{form}, {case.name}: {brief(error)}")
            triton_ce.chunk_bytes, triton_ce.LOGITS_BYTES, chunked.FEWEST_ROWS = kept[1:]
    finally:
        torch.set_float32_matmul_precision(kept[0])
        triton_ce.chunk_bytes, triton_ce.LOGITS_BYTES, chunked.FEWEST_ROWS = kept[1:]
    return found
