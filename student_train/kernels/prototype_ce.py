"""The prototype cross-entropy of RoB, DINO, iBOT, SwAV and MSN, from embeddings and prototypes: one public function."""

import torch
from torch import Tensor

from . import choice, chunked, reference
from .target import DenseTarget, EmbeddingTarget, Target, TopKTarget

IMPLS = ("auto", "triton", "chunked", "reference")


def prototype_cross_entropy(
    student_embedding: Tensor,
    student_prototypes: Tensor,
    target: Target,
    *,
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None = None,
    pair_weights: Tensor,
    student_bias: Tensor | None = None,
    impl: str = "auto",
    check_finite: bool | None = None,
) -> Tensor:
    """sum_{v,g} pair_weights[v,g] * mean_b H(q[b,g], p[b,v]), without a tensor of all rows by all prototypes beyond a budget.

    B images, V student views, G target views, K prototypes, D dimensions; H(q, p) = -sum_k q_k log p_k in nats,
    p = softmax((student_embedding student_prototypes^T + student_bias) / student_temp), q = softmax((t - centre) / teacher_temp)
    with t the target's logits.

    student_embedding: (B, V, D) float, normalised by the caller if at all. Gets a gradient.
    student_prototypes: (K, D) float, the effective rows: weight norm is left to torch, which differentiates it at no
        noticeable cost. Gets a gradient.
    target: G views of the same images over the same K prototypes. Gets no gradient. A top-k target's tail is spread
        evenly over the prototypes that it does not name.
    student_temp, teacher_temp: positive.
    centre: (K,) subtracted from the target's logits: DINO's running mean, or Sinkhorn's (kernels/sinkhorn.py).
    pair_weights: (V, G), or (B, V, G) to weigh images too, used as given: zero where a pair is skipped, 1 / number of
        pairs for a mean.
    student_bias: (K,) float, of a head whose last layer has one. Gets a gradient.
    impl: "triton" (CUDA, compute capability 8 and up: the logits by a kernel of ours), "chunked" (any device: the logits by
        the library, on CUDA in the autocast dtype), "reference" (the formula, with every logit in memory in float32), or
        "auto", which picks by device, dtype and size (choice.py).
    check_finite: whether to raise when the loss is not finite. The check reads the loss back, which makes a GPU wait: by
        default only CPU tensors are checked, and elsewhere a bad row shows as a NaN loss.

    Returns a float32 scalar (float64 for float64 inputs). Sums are accumulated in float32 for inputs of any smaller
    dtype, and no finite logit overflows. Under CUDA autocast the matrix products take its dtype, as torch's would; CPU
    autocast does not lower the precision. Cannot be differentiated twice, except for "reference".

    Raises ValueError where shapes or arguments do not fit, FloatingPointError naming the offending rows if the loss is
    NaN or infinite.
    """
    _check_arguments(
        student_embedding, student_prototypes, target, student_temp, teacher_temp, centre, pair_weights, student_bias
    )
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; known: {', '.join(IMPLS)}")
    if impl == "auto":
        impl = choose_impl(student_embedding, student_prototypes, target)
    inputs = (
        student_embedding,
        student_prototypes,
        target,
        student_temp,
        teacher_temp,
        centre,
        pair_weights,
        student_bias,
    )
    device, dtype = student_embedding.device, _product_dtype(student_embedding, student_prototypes)
    lowered = impl == "reference" and device.type == "cuda" and torch.is_autocast_enabled("cuda")
    with torch.autocast(device.type, enabled=lowered):
        if impl == "reference":
            loss = reference.prototype_cross_entropy(*inputs)
        elif impl == "triton" or (impl == "chunked" and choice.has_kernels(device, dtype)):
            from . import triton_ce  # triton is a Linux package

            loss = triton_ce.prototype_cross_entropy(*inputs, dtype=dtype, tiled=impl == "triton")
        else:
            loss = chunked.prototype_cross_entropy(*inputs)
    if device.type == "cpu" if check_finite is None else check_finite:
        _raise_unless_finite(loss, student_embedding, student_prototypes, target, centre, pair_weights, student_bias)
    return loss


def choose_impl(student_embedding: Tensor, student_prototypes: Tensor, target: Target) -> str:
    """What "auto" stands for: by device, dtype and size."""
    (b, v, d), k = student_embedding.shape, len(student_prototypes)
    widest = max(d, target.embedding.shape[2] if isinstance(target, EmbeddingTarget) else 0)
    dtype = _product_dtype(student_embedding, student_prototypes)
    return choice.fastest(student_embedding.device, dtype, b * v, k, widest)


def _product_dtype(embedding: Tensor, prototypes: Tensor) -> torch.dtype:
    if embedding.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(embedding.dtype, prototypes.dtype)


def _check_arguments(embedding, prototypes, target, student_temp, teacher_temp, centre, pair_weights, bias) -> None:
    if embedding.ndim != 3 or prototypes.ndim != 2 or embedding.shape[2] != prototypes.shape[1]:
        raise ValueError(
            "student_embedding must be (B, V, D) and student_prototypes (K, D), "
            f"got {tuple(embedding.shape)} and {tuple(prototypes.shape)}"
        )
    (b, v, _), k = embedding.shape, len(prototypes)
    if 0 in embedding.shape or k == 0:
        raise ValueError(f"there is nothing to average: student_embedding {tuple(embedding.shape)}, {k} prototypes")
    if target.num_images != b or target.num_prototypes != k:
        raise ValueError(
            f"the target has {target.num_images} images and {target.num_prototypes} prototypes, the student {b} and {k}"
        )
    if pair_weights.shape not in ((v, target.num_views), (b, v, target.num_views)):
        raise ValueError(
            f"pair_weights must be (V, G) = {(v, target.num_views)} or (B, V, G), got {tuple(pair_weights.shape)}"
        )
    for name, values in (("centre", centre), ("student_bias", bias)):
        if values is not None and values.shape != (k,):
            raise ValueError(f"{name} must be (K,) = {(k,)}, got {tuple(values.shape)}")
    for name, temp in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
        if not 0 < temp < float("inf"):
            raise ValueError(f"{name} must be positive, got {temp}")
    devices = {t.device for t in (embedding, prototypes, target, pair_weights, centre, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def _raise_unless_finite(loss: Tensor, embedding, prototypes, target, centre, pair_weights, bias) -> None:
    if torch.isfinite(loss):
        return
    rows = {"student_embedding": embedding, "student_prototypes": prototypes, "pair_weights": pair_weights}
    rows |= {name: values for name, values in (("centre", centre), ("student_bias", bias)) if values is not None}
    match target:
        case EmbeddingTarget():
            rows |= {"target.embedding": target.embedding, "target.prototypes": target.matrix}
        case TopKTarget():
            rows |= {"target.logits": target.logits, "target.tail": target.tail}
        case DenseTarget():  # -inf excludes a prototype, but one must be left
            excluded = target.logits.isneginf()
            rows["target.logits"] = target.logits.masked_fill(excluded & ~excluded.all(-1, keepdim=True), 0)
    bad = {name: (~torch.isfinite(values)).any(-1).nonzero().tolist() for name, values in rows.items()}
    found = "; ".join(f"{name}{at[:4]}{' and more' * (len(at) > 4)}" for name, at in bad.items() if at)
    cause = f"NaN or infinite rows in {found}" if found else "the inputs are finite, but their products overflow"
    raise FloatingPointError(f"the prototype cross-entropy is {loss.item()}: {cause}")
