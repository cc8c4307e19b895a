"""The three Triton kernels of the prototype cross-entropy. With s = scale * (query keys^T + offset) in base 2:

    exponentials   2^(s - anchor + LIFT) in the operands' dtype, its float32 sums over a tile, and those before rounding
    log_sum_exp    log2 of the sum of 2^s, for rows whose s may spread so far that no anchor known beforehand is safe
    softmax_rows   2^(s - log_sum_exp + LIFT) of logits that are in memory already, its sums and log_sum_exp

`exponentials` is a plain product with an epilogue: a row's largest logit need not be known, as an anchor that bounds it
(Cauchy-Schwarz) divides out again with the sum. The sums are of what was stored, rounded as it is, so that weights divided by
them sum to one: else a mean of prototypes that all lie on one side of a row would be off by as much. The log-sum-exp comes from
the exact ones. LIFT keeps small probabilities out of float16's subnormal numbers. Each
kernel has a plain reference of its name in reference.py.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from .products import processors


def _configs(*tiles: tuple[int, int, int, int]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_ROWS": rows, "BLOCK_PROTOS": protos}, num_warps=warps, num_stages=stages)
        for rows, protos, warps, stages in tiles
    ]


CONFIGS = _configs((128, 256, 8, 3), (128, 128, 8, 3), (128, 128, 4, 3), (64, 128, 4, 3))
"""Tiles to try: a program scores BLOCK_ROWS rows against BLOCK_PROTOS prototypes."""

REGISTER_CONFIGS = _configs((128, 256, 8, 3), (128, 128, 8, 3), (64, 256, 8, 2), (64, 128, 4, 3))
"""The same where a product's operands pass through registers: everything but Hopper and the B200."""

BLOCK_BYTES = 128
"""Bytes of a row that a step of a product reads: 64 half or 32 float32 dimensions, a line of cache."""

SUM_BLOCK = 128
"""Prototypes a row of `exponentials`' partial sums: the narrowest tile."""

ROW_TILES = dict(BLOCK_ROWS=64, BLOCK_PROTOS=64)
"""Of `log_sum_exp`, which few runs need: not tuned."""

ROW_STAGES = 3

SMALL = dict(BLOCK_ROWS=16, BLOCK_PROTOS=32)
"""The interpreter's tiles."""

PASS_BLOCK = 4096
"""Logits of a row that `softmax_rows` holds at once."""

SAFE = 60.0
"""Bounds on |s| up to which the exponents, in [-2 bound, 0], stay above bfloat16's and float32's smallest, 2^-126."""


def shared_bytes(config: triton.Config) -> int:
    """Of the operands' tiles in flight."""
    rows, protos = config.kwargs["BLOCK_ROWS"], config.kwargs["BLOCK_PROTOS"]
    return (rows + protos) * BLOCK_BYTES * config.num_stages


def fitting_configs(shared: int, major: int) -> list[triton.Config]:
    """Those that a processor of compute capability ``major`` with ``shared`` bytes of shared memory a block can run."""
    configs = CONFIGS if major in (9, 10) else REGISTER_CONFIGS
    return [config for config in configs if shared_bytes(config) <= shared]


def _prune(configs, _arguments, *, PRECISION, **_meta):
    return configs if len(configs) == 1 else device_configs(PRECISION)  # of one, the caller chose it


def device_configs(precision: str) -> list[triton.Config]:
    """Those to try on the current device."""
    if precision == "ieee":  # without tensor cores: the smallest will do
        return CONFIGS[-1:]
    utils = triton.runtime.driver.active.utils  # pyright: ignore[reportAttributeAccessIssue]
    shared = utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    return fitting_configs(shared, torch.cuda.get_device_capability()[0])


@triton.jit
def _product(
    query,
    keys,
    rows,
    protos,
    num_rows,
    num_prototypes,
    width,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROTOS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """query[rows] keys[protos]^T, a tile in float32. ``width``, D, is a multiple of BLOCK_D."""
    row_ok, proto_ok = (rows < num_rows)[:, None], (protos < num_prototypes)[None, :]
    row_at, proto_at = rows[:, None].to(tl.int64) * width, protos[None, :].to(tl.int64) * width
    total = tl.zeros([BLOCK_ROWS, BLOCK_PROTOS], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(query + row_at + d[None, :], mask=row_ok, other=0.0)
        b = tl.load(keys + proto_at + d[:, None], mask=proto_ok, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_rows", "num_prototypes", "rows_bucket"])
def _exponentials(
    query,  # (R, D)
    keys,  # (K, D)
    offset,  # (K,) float32, when OFFSET
    anchors,  # (R,) float32
    out,  # (R, K) in the dtype of what it will be multiplied with, rows `stride` apart
    sums,  # (2, ceil(K / SUM_BLOCK), R) float32 out: of what is stored, and of what it was before it was rounded
    num_rows,
    num_prototypes,
    stride,
    scale,
    rows_bucket,  # autotuning key only: num_rows rounded up to a power of two
    width,  # D, a multiple of BLOCK_D
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROTOS: tl.constexpr,
):
    # Neighbouring programs share their prototypes: all rows pass while a tile of prototypes is in cache.
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    proto_tile = tl.program_id(0) // row_tiles
    rows = tl.program_id(0) % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    protos = proto_tile * BLOCK_PROTOS + tl.arange(0, BLOCK_PROTOS)
    s = _product(
        query, keys, rows, protos, num_rows, num_prototypes, width, PRECISION, BLOCK_ROWS, BLOCK_PROTOS, BLOCK_D
    )  # fmt: skip
    row_ok, proto_ok = rows < num_rows, protos < num_prototypes
    if OFFSET:
        s += tl.load(offset + protos, mask=proto_ok, other=0.0)[None, :]
    anchor = tl.load(anchors + rows, mask=row_ok, other=float("inf"))
    exact = tl.where(proto_ok[None, :], tl.exp2(s * scale - anchor[:, None] + LIFT), 0.0)
    made = exact.to(out.dtype.element_ty)
    exact_sum, sum_made = tl.sum(exact, axis=1), tl.sum(made.to(tl.float32), axis=1)
    slots = tl.cdiv(num_prototypes, SUM_BLOCK)
    for part in tl.static_range(BLOCK_PROTOS // SUM_BLOCK):  # the same rows of sums whatever the tile
        slot = proto_tile * (BLOCK_PROTOS // SUM_BLOCK) + part
        where, ok = sums + slot.to(tl.int64) * num_rows + rows, row_ok & (slot < slots)
        above = sums + (slots + slot).to(tl.int64) * num_rows + rows
        tl.store(where, sum_made if part == 0 else tl.zeros_like(sum_made), mask=ok)
        tl.store(above, exact_sum if part == 0 else tl.zeros_like(exact_sum), mask=ok)
    where = out + rows[:, None].to(tl.int64) * stride + protos[None, :]
    tl.store(where, made, mask=row_ok[:, None] & proto_ok[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_prototypes", "split"])
def _log_sum_exp(
    query,  # (R, D)
    keys,  # (K, D)
    offset,  # (K,) float32, when OFFSET
    bounds,  # (R,) float32: a block of rows whose bounds are all at most `safe` is left out
    log_sums,  # (S, R) float32 out: log2 of the sum of 2^s over the prototypes of split s
    num_rows,
    num_prototypes,
    split,  # prototypes a split
    scale,
    safe,
    width,  # D, a multiple of BLOCK_D
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROTOS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = rows < num_rows
    bound = tl.load(bounds + rows, mask=row_ok, other=0.0)
    if tl.sum((bound > safe).to(tl.int32), axis=0) > 0:
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        first = tl.program_id(1) * split
        last = tl.minimum(first + split, num_prototypes)
        for start in range(first, last, BLOCK_PROTOS):
            protos = start + tl.arange(0, BLOCK_PROTOS)
            s = _product(
                query, keys, rows, protos, num_rows, num_prototypes, width, PRECISION, BLOCK_ROWS, BLOCK_PROTOS, BLOCK_D
            )  # fmt: skip
            if OFFSET:
                s += tl.load(offset + protos, mask=protos < num_prototypes, other=0.0)[None, :]
            s = tl.where((protos < last)[None, :], s * scale, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(s, axis=1))
            total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(s - new_largest[:, None]), axis=1)
            largest = new_largest
        tl.store(log_sums + tl.program_id(1) * num_rows + rows, largest + tl.log2(total), mask=row_ok)


@triton.jit(do_not_specialize=["num_prototypes"])
def _softmax_rows(
    logits,  # (R, K), rows `logits_stride` apart; -inf excludes a prototype
    offset,  # (K,) float32, when OFFSET
    out,  # (R, K), rows `stride` apart
    sums,  # (R,) float32 out: of `out`
    log_sums,  # (R,) float32 out
    num_prototypes,
    logits_stride,
    stride,
    scale,
    OFFSET: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    given, made = logits + row * logits_stride, out + row * stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)  # one a lane, so that no step waits for a reduction
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_prototypes, BLOCK):
        protos = start + tl.arange(0, BLOCK)
        ok = protos < num_prototypes
        s = tl.load(given + protos, mask=ok, other=float("-inf")).to(tl.float32)
        if OFFSET:
            s += tl.load(offset + protos, mask=ok, other=0.0)
        s *= scale
        new_largest = tl.maximum(largest, s)
        anchor = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # as yet only excluded prototypes
        total = total * tl.exp2(largest - anchor) + tl.exp2(s - anchor)
        largest = new_largest
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log2(tl.sum(total * tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top)), axis=0))
    tl.store(log_sums + row, log_sum)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_prototypes, BLOCK):
        protos = start + tl.arange(0, BLOCK)
        ok = protos < num_prototypes
        s = tl.load(given + protos, mask=ok, other=float("-inf")).to(tl.float32)
        if OFFSET:
            s += tl.load(offset + protos, mask=ok, other=0.0)
        p = tl.exp2(s * scale - log_sum + LIFT).to(out.dtype.element_ty)
        tl.store(made + protos, p, mask=ok)
        total += p.to(tl.float32)
    tl.store(sums + row, tl.sum(total, axis=0))


def launcher(configs: list[triton.Config]):
    """`exponentials`, by the fastest of ``configs`` at each size."""
    return triton.autotune(
        configs,
        key=["rows_bucket", "num_prototypes", "width", "OFFSET"],
        prune_configs_by={"early_config_prune": _prune},
        do_bench=lambda run, quantiles: triton.testing.do_bench(run, warmup=5, rep=20, quantiles=quantiles),
        cache_results=True,
    )(_exponentials)


launch = launcher([triton.Config(SMALL)] if knobs.runtime.interpret else [*CONFIGS, REGISTER_CONFIGS[2]])


# ==== launching ====

_compiled: set[tuple] = set()


def compile_together(arguments: tuple, constants: dict[str, Any]) -> None:
    """All tiles of `exponentials` compiled at once, on all cores, the first time that it meets these dtypes and constants.

    One after the other, as the autotuner would, they take a quarter of a minute.
    """
    key = (torch.cuda.current_device(), arguments[0].dtype, arguments[4].dtype, *constants.values())
    if key in _compiled or not hasattr(triton, "AsyncCompileMode"):
        return
    _compiled.add(key)
    here = ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=key[:1])  # threads begin on GPU 0
    with here as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for config in device_configs(constants["PRECISION"]):
            _exponentials.warmup(*arguments, grid=(1,), **constants, **config.all_kwargs())


def precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies operands of ``dtype``: float32 by torch's own setting."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" and dtype == torch.float32 else "tf32"


def lift(dtype: torch.dtype) -> int:
    """Added to exponents before they are rounded to ``dtype``."""
    return 12 if dtype == torch.float16 else 0


def block_d(dtype: torch.dtype) -> int:
    """Dimensions that a step of a product reads."""
    return BLOCK_BYTES // dtype.itemsize


def whole_steps(rows: torch.Tensor) -> torch.Tensor:
    """(R, D) with zeros behind the last dimension, so that D is read in whole steps: masks would cost registers."""
    missing = -rows.shape[1] % block_d(rows.dtype)
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def exponentials(
    query: torch.Tensor,
    keys: torch.Tensor,
    offset: torch.Tensor | None,
    anchors: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """out (R, K) = 2^(scale (query keys^T + offset) - anchors + lift); returns (2, S, R) float32, whose sums over S are theirs,
    and those before they were rounded to out's dtype.

    query (R, D) and keys (K, D): contiguous, of one dtype; offset (K,) and anchors (R,): float32; out: rows contiguous.
    """
    query, keys = whole_steps(query), whole_steps(keys)
    (rows, d), k = query.shape, len(keys)
    sum_block = SMALL["BLOCK_PROTOS"] if knobs.runtime.interpret else SUM_BLOCK
    sums = anchors.new_empty(2, triton.cdiv(k, sum_block), rows)
    arguments = (
        query, keys, anchors if offset is None else offset, anchors, out, sums, rows, k, out.stride(0), scale,
        triton.next_power_of_2(rows), d,
    )  # fmt: skip
    constants = dict(
        OFFSET=offset is not None,
        PRECISION=precision(query.dtype),
        LIFT=lift(out.dtype),
        BLOCK_D=block_d(query.dtype),
        SUM_BLOCK=sum_block,
    )
    if query.is_cuda:
        compile_together(arguments, constants)
    launch[lambda meta: (triton.cdiv(rows, meta["BLOCK_ROWS"]) * triton.cdiv(k, meta["BLOCK_PROTOS"]),)](
        *arguments, **constants
    )
    return sums


def log_sum_exp(
    query: torch.Tensor,
    keys: torch.Tensor,
    offset: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    safe: float = SAFE,
) -> torch.Tensor:
    """(S, R) float32 log2 of the sums of 2^(scale (query keys^T + offset)) over S parts of the prototypes where
    bounds (R,) > safe; anything where not."""
    query, keys = whole_steps(query), whole_steps(keys)
    (rows, d), k = query.shape, len(keys)
    tiles = SMALL if knobs.runtime.interpret else ROW_TILES
    row_blocks, block = triton.cdiv(rows, tiles["BLOCK_ROWS"]), tiles["BLOCK_PROTOS"]
    splits = max(1, 2 * processors(query.device) // row_blocks)
    split = block * triton.cdiv(triton.cdiv(k, splits), block)
    splits = triton.cdiv(k, split)
    log_sums = bounds.new_empty(splits, rows)
    options = {} if knobs.runtime.interpret else dict(num_warps=8, num_stages=ROW_STAGES)
    _log_sum_exp[(row_blocks, splits)](
        query, keys, bounds if offset is None else offset, bounds, log_sums, rows, k, split, scale, safe, d,
        OFFSET=offset is not None, PRECISION=precision(query.dtype), BLOCK_D=block_d(query.dtype), **tiles, **options,
    )  # fmt: skip
    return log_sums


def softmax_rows(
    logits: torch.Tensor,
    offset: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    sums: torch.Tensor,
    log_sums: torch.Tensor,
) -> None:
    """out (R, K) = 2^(s - log_sum_exp + lift), s = scale (logits + offset); sums (R,) and log_sums (R,), float32, become its
    sums and log_sum_exp.

    logits (R, K), out (R, K): rows contiguous, any dtype up to float32; offset (K,): float32.
    """
    rows, k = logits.shape
    options = {} if knobs.runtime.interpret else dict(num_warps=8)
    _softmax_rows[(rows,)](
        logits, log_sums if offset is None else offset, out, sums, log_sums,
        k, logits.stride(0), out.stride(0), scale,
        OFFSET=offset is not None, LIFT=lift(out.dtype), BLOCK=min(PASS_BLOCK, triton.next_power_of_2(k)), **options,
    )  # fmt: skip
