"""Inputs of the prototype cross-entropy, its value and gradients, and how far they may be from the float64 truth."""

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from rob.student_train.kernels import (
    DenseTarget,
    EmbeddingTarget,
    Target,
    TopKTarget,
    prototype_cross_entropy,
    reference,
)

KINDS = ("embedding", "topk", "dense")
GRADIENTS = ("loss", "embedding", "prototypes", "bias")


class Case(NamedTuple):
    embedding: Tensor
    prototypes: Tensor
    target: Target
    student_temp: float
    teacher_temp: float
    centre: Tensor | None
    pair_weights: Tensor
    student_bias: Tensor | None = None


def make_case(
    kind: str,
    images: int = 5,
    views: int = 4,
    targets: int = 2,
    dim: int = 24,
    num_prototypes: int = 50,
    dtype: torch.dtype = torch.float32,
    student_temp: float = 0.1,
    teacher_temp: float = 0.05,
    k: int = 8,
    centred: bool = True,
    teacher_dim: int | None = None,
    seed: int = 0,
    biased: bool = False,
) -> Case:
    """Random unit rows on both sides; same-view pairs left out where there are others; the target's tensors in ``dtype`` too.

    ``biased``: the student's as an MLP straight to K logits has them: rows of any length, and a bias a prototype.
    """
    random = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=random), dim=-1).to(dtype)

    embedding, prototypes = unit(images, views, dim), unit(num_prototypes, dim)
    teacher = EmbeddingTarget(unit(images, targets, teacher_dim or dim), unit(num_prototypes, teacher_dim or dim))
    logits = teacher.embedding.float() @ teacher.prototypes.float().T
    weights = torch.rand(views, targets, generator=random)
    if views > 1:
        weights *= 1 - torch.eye(views, targets)
    centre = 0.1 * torch.randn(num_prototypes, generator=random) if centred else None
    target = {
        "embedding": lambda: teacher,
        "dense": lambda: DenseTarget(logits.to(dtype)),
        "topk": lambda: topk_target(logits, min(k, num_prototypes), [0.8 * teacher_temp, 1.4 * teacher_temp], dtype),
    }[kind]()
    bias = None
    if biased:
        embedding = embedding * torch.rand(images, views, 1, generator=random).add(0.5).to(dtype)
        bias = (0.2 * torch.randn(num_prototypes, generator=random)).to(dtype)
    return Case(embedding, prototypes, target, student_temp, teacher_temp, centre, weights / weights.sum(), bias)


def topk_target(logits: Tensor, k: int, temps: list[float], dtype: torch.dtype = torch.float32) -> TopKTarget:
    """What the store would hold of (B, G, K) logits."""
    largest, ids = logits.topk(k, dim=2)
    rest = logits.scatter(2, ids, -torch.inf)
    tail = torch.stack([torch.logsumexp(rest / temp, dim=2) for temp in temps], dim=2)
    return TopKTarget(ids, largest.to(dtype), tail, tuple(temps), logits.shape[2])


def wide(case: Case) -> Case:
    """The same numbers in float64."""
    target = case.target
    floats = {f.name: getattr(target, f.name) for f in fields(target)}
    floats = {n: t.double() for n, t in floats.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return Case(*(t.double() if isinstance(t, Tensor) else t for t in case))._replace(target=replace(target, **floats))


def outcome(function, case: Case, upstream: float = 1.0) -> list[Tensor]:
    """Loss, its gradients by the embedding, by the prototypes and, if there is one, by the bias, in float64."""
    learned = [t.detach().clone().requires_grad_() for t in (*case[:2], case.student_bias) if t is not None]
    loss = function(*learned[:2], *case[2:7], *learned[2:])
    (loss * upstream).backward()
    return [loss.detach().double(), *(t.grad.double() for t in learned)]


def plain_torch(embedding, prototypes, target, student_temp, teacher_temp, centre, pair_weights, bias=None) -> Tensor:
    """The formula as one writes it for training: products in the inputs' own dtype, softmax in float32."""
    log_p = torch.log_softmax(linear(embedding, prototypes, bias).float() / student_temp, dim=2)
    if isinstance(target, EmbeddingTarget):
        target = DenseTarget(target.embedding @ target.prototypes.T)
    q = reference.target_probabilities(target, teacher_temp, centre)
    return -(pair_weights * torch.einsum("bvk,bgk->bvg", log_p, q)).sum() / len(embedding)


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Of loss and gradients: Euclidean norm of the error over that of the truth."""
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]


def assert_as_exact_as_torch(function, case: Case, slack: float = 1.0) -> None:
    """Errors against float64 no larger than those of the plain formula in the case's own dtype, times ``slack``.

    Beside that a few rounding errors are free: in the accumulation's dtype for the sums, and half a unit in the last place
    where a gradient is rounded to its own dtype.
    """
    truth = outcome(reference.prototype_cross_entropy, wide(case))
    torchs = errors(outcome(plain_torch, case), truth)
    ours = errors(outcome(function, case), truth)
    sums = 8 * torch.finfo(torch.float32).eps
    rounding = torch.finfo(case.embedding.dtype).eps / 2
    frees = [sums] + (len(truth) - 1) * [sums + rounding]
    for name, our, theirs, free in zip(GRADIENTS[: len(truth)], ours, torchs, frees, strict=True):
        assert our <= slack * theirs + free, f"{name}: error {our:.2e}, torch's own {theirs:.2e}"


def call(case, impl="chunked", **changes):
    return prototype_cross_entropy(
        case.embedding,
        case.prototypes,
        changes.pop("target", case.target),
        student_temp=case.student_temp,
        teacher_temp=case.teacher_temp,
        centre=case.centre,
        pair_weights=case.pair_weights,
        student_bias=case.student_bias,
        impl=impl,
        **changes,
    )
