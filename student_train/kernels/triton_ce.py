"""The prototype cross-entropy on CUDA, around the two kernels of triton_kernels.py.

With z a student row, P the student's prototypes and w the pair weights, all that the loss needs of a target q is the
mean of the prototypes under it, a D-vector: <q, s> = z . (q P) / student_temp. So, per image,

    mix_v   = sum_g w[v,g] q_g P               W_v = sum_g w[v,g]
    loss    = sum_v W_v logsumexp(s_v) - z_v . mix_v / student_temp
    dz_v    = (W_v p_v P - mix_v) / student_temp
    dP      = sum_v W_v p_v^T z_v / student_temp - sum_g q_g^T (sum_v w[v,g] z_v) / student_temp

p P and q P come from `attend` in the forward pass, the two sums over rows of dP from `prototype_gradient` in the
backward pass. Each row costs four matrix products, one of them recomputed, and the largest thing in memory is S x rows x D
for S splits. A top-k target needs no kernel: k prototypes are gathered, and the rest share one sum.
"""

import math

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .target import DenseTarget, EmbeddingTarget, Target
from .topk import add_topk_gradient_, topk_means, topk_probabilities
from .triton_kernels import TARGET_STAGES, attend, prototype_gradient

BLOCKS_PER_PROCESSOR = 2
"""Thread blocks of `attend` to launch for each multiprocessor: splits over the prototypes make up for few rows."""


def _split(num_rows: int, num_prototypes: int, device: torch.device) -> int:
    """Prototypes a split, a multiple of 128 so that no split is empty whatever the tile."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    splits = max(1, BLOCKS_PER_PROCESSOR * processors // triton.cdiv(num_rows, 128))
    return 128 * triton.cdiv(triton.cdiv(num_prototypes, splits), 128)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" and dtype == torch.float32 else "tf32"


def _lift(dtype: torch.dtype) -> int:
    return 12 if dtype == torch.float16 else 0


def _means(
    query: Tensor,  # (R, DQ), or (R, K) logits when keys is None
    keys: Tensor | None,  # (K, DQ)
    values: Tensor,  # (K, DV)
    temp: float,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(R, DV) mean of the values under each row's softmax, and (R,) base-2 log-sum-exp of its logits; both float32."""
    (rows, dq), (k, dv) = query.shape, values.shape
    dense = keys is None
    dq = 1 if dense else dq
    split = _split(rows, k, values.device)
    splits = triton.cdiv(k, split)
    means = values.new_empty(splits, rows, dv, dtype=torch.float32)
    log_sums = values.new_empty(splits, rows, dtype=torch.float32)
    attend[lambda meta: (triton.cdiv(rows, meta["BLOCK_OUT"]), splits)](
        query, values if dense else keys, values, query, log_sums if centre is None else centre, means, log_sums,
        rows, k, split, math.log2(math.e) / temp, triton.next_power_of_2(rows),
        DQ=dq, DV=dv, WIDTH_Q=max(16, triton.next_power_of_2(dq)), WIDTH_V=max(16, triton.next_power_of_2(dv)),
        DENSE=dense, CENTRED=centre is not None, SHARED=keys is values,
        PRECISION=_precision(values.dtype), LIFT=_lift(values.dtype),
    )  # fmt: skip
    if splits == 1:
        return means[0], log_sums[0]
    total = torch.logsumexp(log_sums * math.log(2), dim=0) / math.log(2)
    shares = torch.exp2(log_sums - total)
    return torch.einsum("sr,srd->rd", shares, means), total


class _TritonCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_embedding, student_prototypes, target, student_temp, teacher_temp, centre, weights, dtype):
        (b, v, d), g = student_embedding.shape, target.num_views
        z = student_embedding.to(dtype).reshape(b * v, d).contiguous()
        prototypes = student_prototypes.to(dtype).contiguous()
        weights = weights.float() / b
        centre = None if centre is None else centre.float().contiguous()

        student_means, student_log_sums = _means(z, prototypes, prototypes, student_temp, None)
        rows = keys = target_log_sums = topk = None
        match target:
            case EmbeddingTarget():
                target_dtype = target.embedding.dtype if target.embedding.element_size() == 2 else dtype
                rows = target.embedding.reshape(b * g, -1).to(target_dtype).contiguous()
                keys = target.matrix.to(target_dtype).contiguous()
                means, target_log_sums = _means(rows, keys, prototypes, teacher_temp, centre)
            case DenseTarget():
                rows = target.logits.reshape(b * g, -1).contiguous()
                means, target_log_sums = _means(rows, None, prototypes, teacher_temp, centre)
            case _:
                topk = target.ids, *topk_probabilities(target, teacher_temp, centre)
                means = topk_means(*topk, prototypes).view(b * g, d)

        total = weights.sum(2)
        mix = torch.einsum("bvg,bgd->bvd", weights, means.view(b, g, d))
        log_sum_exp = student_log_sums.view(b, v) * math.log(2)
        rows_z = z.view(b, v, d).float()
        loss = (total * log_sum_exp).sum() - (rows_z * mix).sum() / student_temp
        if ctx.needs_input_grad[0]:
            ctx.grad_embedding = (total.unsqueeze(2) * student_means.view(b, v, d) - mix) / student_temp
        if ctx.needs_input_grad[1]:
            mixed_student = torch.einsum("bvg,bvd->bgd", weights, rows_z).reshape(b * g, d)
            ctx.save_for_backward(
                z, prototypes, student_log_sums, total, mixed_student, rows, keys, centre, target_log_sums
            )
            ctx.topk = topk
            ctx.temps = student_temp, teacher_temp
        ctx.dtypes = student_embedding.dtype, student_prototypes.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's signature)
        (upstream,) = grad_outputs
        grad_embedding = grad_prototypes = None
        if ctx.needs_input_grad[0]:
            grad_embedding = (ctx.grad_embedding * upstream).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_prototypes = _grad_prototypes(ctx, upstream)
        return grad_embedding, grad_prototypes, None, None, None, None, None, None


def _grad_prototypes(ctx, upstream: Tensor) -> Tensor:
    z, prototypes, student_log_sums, total, mixed_student, rows, keys, centre, target_log_sums = ctx.saved_tensors
    student_temp, teacher_temp = ctx.temps
    (k, d), sparse, dense = prototypes.shape, rows is None, keys is None
    dt = 1 if dense else keys.shape[1]
    # Weights are brought to at most 1 before they meet the operands' dtype: they are of the order 1 / (B V).
    largest = torch.maximum(total.abs().max(), mixed_student.abs().max()).clamp_min(torch.finfo(torch.float32).tiny)
    student_weights = (total / largest).flatten()
    mixed = (mixed_student / largest).to(z.dtype)
    target_weights = mixed.new_full((len(mixed),), -1.0, dtype=torch.float32)
    gradient = prototypes.new_empty(k, d, dtype=torch.float32 if sparse else ctx.dtypes[1])
    prototype_gradient[lambda meta: (triton.cdiv(k, meta["BLOCK_OUT"]),)](
        z, prototypes, student_log_sums, student_weights,
        z if rows is None or dense else rows, prototypes if dense else keys, z if rows is None else rows,
        student_weights if centre is None else centre,
        student_log_sums if sparse else target_log_sums, target_weights, mixed,
        gradient, upstream * largest / student_temp,
        len(z), len(mixed), k, math.log2(math.e) / student_temp, math.log2(math.e) / teacher_temp,
        triton.next_power_of_2(len(z)),
        D=d, DT=dt, WIDTH=max(16, triton.next_power_of_2(d)), WIDTH_T=max(16, triton.next_power_of_2(dt)),
        DENSE=dense and not sparse, CENTRED=centre is not None and not sparse,
        PRECISION=_precision(z.dtype), LIFT=_lift(z.dtype), TARGETS=not sparse, TARGET_STAGES=TARGET_STAGES,
    )  # fmt: skip
    if ctx.topk is not None:
        ids, at_ids, elsewhere = ctx.topk
        add_topk_gradient_(gradient, ids, at_ids, elsewhere, mixed_student * (-upstream / student_temp))
    return gradient.to(ctx.dtypes[1])


def prototype_cross_entropy(
    student_embedding: Tensor,
    student_prototypes: Tensor,
    target: Target,
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None,
    pair_weights: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As reference.prototype_cross_entropy, accumulated in float32.

    dtype: what the tensor cores multiply; None for that of the embedding and prototypes.
    """
    dtype = dtype or torch.promote_types(student_embedding.dtype, student_prototypes.dtype)
    weights = pair_weights.expand(len(student_embedding), -1, -1)
    return _TritonCrossEntropy.apply(
        student_embedding, student_prototypes, target, student_temp, teacher_temp, centre, weights, dtype
    )
