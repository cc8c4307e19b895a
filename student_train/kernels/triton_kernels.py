"""The two Triton kernels of the prototype cross-entropy. Neither writes anything of size rows x prototypes.

Both are attention in disguise. With queries the student's rows (or a target's) and keys the prototypes that score them:

    attend               softmax(query keys^T) values, and the row's log-sum-exp: the prototypes' mean under p (or q)
    prototype_gradient   softmax(query keys^T)^T rows, for p and q together: what the prototypes get back

Each recomputes its logits tile by tile. Exponentials are base 2, in float32, relative to a running row maximum, so that no
finite logit overflows. LIFT is added to every exponent before the cast to the operands' dtype and taken off again in the
result: without it float16 would flush the small probabilities, of which there are many.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from triton import knobs

CONFIGS = [
    triton.Config({"BLOCK_OUT": out, "BLOCK_IN": inner}, num_warps=warps, num_stages=stages)
    for out, inner, warps, stages in [
        (128, 128, 8, 2),
        (128, 64, 8, 4),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 3),
        (64, 64, 8, 3),
        (64, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 32, 8, 3),
        (64, 32, 8, 2),
        (64, 32, 4, 3),
        (32, 32, 4, 2),
        (16, 32, 4, 2),
    ]
]
"""Tiles to try. BLOCK_OUT rows of the result stay in registers; BLOCK_IN rows are streamed past them."""

SHARED_MEMORY = {8: 163 << 10, 9: 227 << 10}
"""Bytes of shared memory that a block may have, by the major compute capability: A100 and H100."""

REGISTERS = {8: 100, 9: 160}
"""Float32 values of accumulator and logits that a thread may hold. Ampere's mma also wants its operands in registers."""

TARGET_STAGES = 2
"""Pipeline stages of the prototype gradient's loop over targets, which streams two tensors where the student's needs one."""


def fitting_configs(
    kernel: str, width: int, itemsize: int, major: int, one_stream: bool, dense: bool
) -> list[triton.Config]:
    """The configs without spills and within shared memory, which tests/test_prototype_ce_compile.py compiles to see.

    kernel: "attend" or "prototype_gradient"; width: the widest row, a power of two; itemsize: of an operand; major: the
    compute capability; one_stream: the inner loop reads one tensor, as keys and values are one or there are no targets;
    dense: it reads logits.
    """

    def fits(config: triton.Config) -> bool:
        out, inner, stages = config.kwargs["BLOCK_OUT"], config.kwargs["BLOCK_IN"], config.num_stages
        if one_stream:
            streamed = inner * stages
        elif kernel == "attend":
            streamed = 2 * inner * stages
        else:
            streamed = max(inner * stages, 2 * inner * TARGET_STAGES)
        pointers = 2 * inner if dense else 0
        registers = out * (width + inner + pointers) / (32 * config.num_warps)
        return (out + streamed) * width * itemsize <= SHARED_MEMORY[min(major, 9)] and registers <= REGISTERS[
            min(major, 9)
        ]

    fitting = [config for config in CONFIGS if fits(config)]
    large = [config for config in fitting if config.kwargs["BLOCK_OUT"] >= 64]
    return large or fitting


def _prune_attend(_configs, arguments, *, WIDTH_Q, WIDTH_V, SHARED, DENSE, **_meta):
    itemsize, major = arguments["values"].element_size(), torch.cuda.get_device_capability()[0]
    return fitting_configs("attend", max(WIDTH_Q, WIDTH_V), itemsize, major, SHARED, DENSE)


def _prune_prototype_gradient(_configs, arguments, *, WIDTH, WIDTH_T, TARGETS, DENSE, **_meta):
    itemsize, major = arguments["prototypes"].element_size(), torch.cuda.get_device_capability()[0]
    return fitting_configs("prototype_gradient", max(WIDTH, WIDTH_T), itemsize, major, not TARGETS, DENSE)


@triton.jit
def _attend(
    query,  # (R, DQ)
    keys,  # (K, DQ)
    values,  # (K, DV)
    logits,  # (R, K), read in place of query keys^T when DENSE
    centre,  # (K,) float32, subtracted from the logits when CENTRED
    means,  # (S, R, DV) float32 out: the values' mean under the softmax of split s
    log_sums,  # (S, R) float32 out: log2 of the sum of 2^logit over split s
    num_rows,
    num_prototypes,
    split,  # prototypes a split, a multiple of every BLOCK_IN
    scale,  # log2(e) / temperature
    rows_bucket,  # autotuning key only: num_rows rounded up to a power of two
    DQ: tl.constexpr,
    DV: tl.constexpr,
    WIDTH_Q: tl.constexpr,  # DQ and DV rounded up to powers of two
    WIDTH_V: tl.constexpr,
    DENSE: tl.constexpr,
    CENTRED: tl.constexpr,
    SHARED: tl.constexpr,  # keys and values are one tensor
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dq, dv = tl.arange(0, WIDTH_Q), tl.arange(0, WIDTH_V)
    row_ok = rows < num_rows
    if not DENSE:
        query_tile = tl.load(query + rows[:, None] * DQ + dq, mask=row_ok[:, None] & (dq < DQ), other=0.0)

    largest = tl.full([BLOCK_OUT], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_OUT], tl.float32)
    weighted = tl.zeros([BLOCK_OUT, WIDTH_V], tl.float32)
    first = tl.program_id(1) * split
    for start in range(first, tl.minimum(first + split, num_prototypes), BLOCK_IN):
        protos = start + tl.arange(0, BLOCK_IN)
        proto_ok = protos < num_prototypes
        if DENSE:
            offsets = rows[:, None].to(tl.int64) * num_prototypes + protos
            s = tl.load(logits + offsets, mask=row_ok[:, None] & proto_ok, other=0.0).to(tl.float32)
        else:
            key_tile = tl.load(keys + protos[:, None] * DQ + dq, mask=proto_ok[:, None] & (dq < DQ), other=0.0)
            s = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
        if CENTRED:
            s -= tl.load(centre + protos, mask=proto_ok, other=0.0)
        s = tl.where(proto_ok, s * scale, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(s, axis=1))
        anchor = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # as yet only excluded prototypes
        p = tl.exp2(s - anchor[:, None] + LIFT)
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(p, axis=1)
        if SHARED:
            value_tile = key_tile
        else:
            value_tile = tl.load(values + protos[:, None] * DV + dv, mask=proto_ok[:, None] & (dv < DV), other=0.0)
        weighted = tl.dot(p.to(value_tile.dtype), value_tile, weighted * shrink[:, None], input_precision=PRECISION)
        largest = new_largest

    out = tl.program_id(1) * num_rows + rows
    mean = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(means + out[:, None].to(tl.int64) * DV + dv, mean, mask=row_ok[:, None] & (dv < DV))
    tl.store(log_sums + out, largest + tl.log2(total) - LIFT, mask=row_ok)


@triton.jit
def _add_rows(
    gradient,  # (BLOCK_OUT, WIDTH_V) the sum so far
    protos,
    query,  # (R, DQ)
    keys,  # (K, DQ)
    rows_given,  # (R, DV)
    logits,
    centre,
    log_sums,  # (R,)
    row_weights,  # (R,)
    num_rows,
    num_prototypes,
    scale,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    WIDTH_Q: tl.constexpr,
    WIDTH_V: tl.constexpr,
    DENSE: tl.constexpr,
    CENTRED: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,  # None: as the config says
):
    """gradient + sum over rows of row_weight 2^(logit - log_sum + LIFT) row."""
    dq, dv = tl.arange(0, WIDTH_Q), tl.arange(0, WIDTH_V)
    proto_ok = protos < num_prototypes
    if not DENSE:
        key_tile = tl.load(keys + protos[:, None] * DQ + dq, mask=proto_ok[:, None] & (dq < DQ), other=0.0)
    if CENTRED:
        centre_tile = tl.load(centre + protos, mask=proto_ok, other=0.0)
    for start in tl.range(0, num_rows, BLOCK_IN, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_IN)
        row_ok = rows < num_rows
        if DENSE:
            offsets = rows.to(tl.int64) * num_prototypes + protos[:, None]
            s = tl.load(logits + offsets, mask=proto_ok[:, None] & row_ok, other=0.0).to(tl.float32)
        else:
            query_tile = tl.load(query + rows[:, None] * DQ + dq, mask=row_ok[:, None] & (dq < DQ), other=0.0)
            s = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
        if CENTRED:
            s -= centre_tile[:, None]
        log_sum = tl.load(log_sums + rows, mask=row_ok, other=float("inf"))  # so that a missing row weighs nothing
        weight = tl.load(row_weights + rows, mask=row_ok, other=0.0)
        # Recomputed in another order, an enormous logit may exceed its row's log-sum-exp by rounding.
        p = tl.exp2(tl.minimum(s * scale - log_sum, 0.0) + LIFT) * weight
        if SHARED:
            value_tile = query_tile
        else:
            value_tile = tl.load(rows_given + rows[:, None] * DV + dv, mask=row_ok[:, None] & (dv < DV), other=0.0)
        gradient = tl.dot(p.to(value_tile.dtype), value_tile, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def _prototype_gradient(
    student,  # (RS, D)
    prototypes,  # (K, D)
    student_log_sums,  # (RS,) float32, base 2
    student_weights,  # (RS,) float32
    target,  # (RT, DT)
    target_prototypes,  # (K, DT)
    target_logits,  # (RT, K), read in place of target target_prototypes^T when DENSE
    centre,  # (K,) float32
    target_log_sums,  # (RT,) float32, base 2
    target_weights,  # (RT,) float32
    mixed_student,  # (RT, D) the student rows that meet a target, weighted and summed
    gradient,  # (K, D) out
    upstream,  # () the loss's own gradient
    num_student_rows,
    num_target_rows,  # 0 where the target is not of all prototypes
    num_prototypes,
    student_scale,  # log2(e) / student temperature
    target_scale,
    student_rows_bucket,  # autotuning keys only
    D: tl.constexpr,
    DT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_T: tl.constexpr,
    DENSE: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
    TARGETS: tl.constexpr,
    TARGET_STAGES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    protos = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros([BLOCK_OUT, WIDTH], tl.float32)
    total = _add_rows(
        total, protos, student, prototypes, student, student, centre, student_log_sums, student_weights,
        num_student_rows, num_prototypes, student_scale,
        D, D, WIDTH, WIDTH, False, False, True, PRECISION, LIFT, BLOCK_IN, None,
    )  # fmt: skip
    if TARGETS:
        total = _add_rows(
            total, protos, target, target_prototypes, mixed_student, target_logits, centre, target_log_sums,
            target_weights, num_target_rows, num_prototypes, target_scale,
            DT, D, WIDTH_T, WIDTH, DENSE, CENTRED, False, PRECISION, LIFT, BLOCK_IN, TARGET_STAGES,
        )  # fmt: skip
    d = tl.arange(0, WIDTH)
    total *= tl.load(upstream).to(tl.float32) * tl.exp2(-1.0 * LIFT)
    where = gradient + protos[:, None].to(tl.int64) * D + d
    tl.store(where, total, mask=(protos < num_prototypes)[:, None] & (d < D))


def _autotuned(kernel, prune, key):
    configs = CONFIGS[-1:] if knobs.runtime.interpret else CONFIGS
    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": prune}, cache_results=True)(kernel)


attend = _autotuned(
    _attend, _prune_attend, key=["rows_bucket", "num_prototypes", "WIDTH_Q", "WIDTH_V", "DENSE", "SHARED"]
)
prototype_gradient = _autotuned(
    _prototype_gradient,
    _prune_prototype_gradient,
    key=["student_rows_bucket", "num_prototypes", "WIDTH", "WIDTH_T", "DENSE", "TARGETS"],
)
