"""What goes around the kernels that score rows, each in one launch: on a GPU they cost the host more than the device.

    row_bounds   rows in the operands' dtype, and |row| max |P| + max |offset|, scaled: a bound on the row's logits
    anchors      that bound where it is safe, the row's own log-sum-exp where it is not
    row_sums     the partial sums of `exponentials`, added up
    combine      means, weights and sums of some images to their loss and all that its gradients need

On an H200 the loss was made of 73 launches and took their 2.2 to 2.9 ms at any size: benchmarks/loss_notes.md.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

ROWS, WIDTH = 16, 128
"""Tile of `row_bounds`."""

LINE = 128
"""Rows a program of `anchors`."""

SUMMED_ROWS, SUMMED_SLOTS = 32, 32
"""Tile of `row_sums`."""

COMBINED = 2048
"""Elements of an image's views that a program of `combine` holds."""

COMBINED_WARPS = 8
"""With 4, some compilers spill a register or two."""


@triton.jit(do_not_specialize=["num_rows"])
def _row_bounds(
    rows,  # (R, D)
    cast,  # (R, D) out, when CAST
    bounds,  # (R,) float32 out
    longest,  # () float32, when BOUND
    largest,  # () float32, when OFFSET
    num_rows,
    width,
    scale,
    CAST: tl.constexpr,
    BOUND: tl.constexpr,  # else `bounds` are the rows' lengths
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < num_rows
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        ok = row_ok[:, None] & (d < width)[None, :]
        at = row[:, None].to(tl.int64) * width + d[None, :]
        x = tl.load(rows + at, mask=ok, other=0.0)
        if CAST:
            x = x.to(cast.dtype.element_ty)
            tl.store(cast + at, x, mask=ok)
        wide = x.to(tl.float32)
        total += tl.sum(wide * wide, axis=1)
    found = tl.sqrt(total)
    if BOUND:
        found *= tl.load(longest)
        if OFFSET:
            found += tl.load(largest)
        found *= scale
    tl.store(bounds + row, found, mask=row_ok)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _anchors(
    bounds,  # (R,) float32
    log_sums,  # (S, R) float32: log2 of the sums of 2^s over S parts of the prototypes; anything where a bound is safe
    out,  # (R,) float32
    num_rows,
    num_splits,
    safe,
    LINE: tl.constexpr,
):
    row = tl.program_id(0) * LINE + tl.arange(0, LINE)
    ok = row < num_rows
    bound = tl.load(bounds + row, mask=ok, other=0.0)
    own = ok & (bound > safe)
    largest = tl.where(own, float("-inf"), 0.0)
    for split in range(num_splits):
        largest = tl.maximum(largest, tl.load(log_sums + split * num_rows + row, mask=own, other=0.0))
    total = tl.zeros([LINE], tl.float32)
    for split in range(num_splits):
        total += tl.exp2(tl.load(log_sums + split * num_rows + row, mask=own, other=0.0) - largest)
    tl.store(out + row, tl.where(bound <= safe, bound, largest + tl.log2(total)), mask=ok)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _row_sums(
    partial,  # (2, S, R) float32, of `exponentials`
    anchors,  # (R,) float32
    sums,  # (R,) float32 out: of what is stored
    log_sums,  # (R,) float32 out: log2 of the sum of 2^s
    num_rows,
    num_slots,
    LIFT: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < num_rows
    made, exact = tl.zeros([SLOTS, ROWS], tl.float32), tl.zeros([SLOTS, ROWS], tl.float32)
    for start in range(0, num_slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        both = (slot < num_slots)[:, None] & ok[None, :]
        at = slot[:, None].to(tl.int64) * num_rows + row[None, :]
        made += tl.load(partial + at, mask=both, other=0.0)
        exact += tl.load(partial + tl.cast(num_slots, tl.int64) * num_rows + at, mask=both, other=0.0)
    tl.store(sums + row, tl.sum(made, axis=0), mask=ok)
    anchor = tl.load(anchors + row, mask=ok, other=0.0)
    total = tl.where(ok, tl.sum(exact, axis=0), 1.0)
    tl.store(log_sums + row, anchor + tl.log2(total) - LIFT, mask=ok)


@triton.jit(do_not_specialize=["num_images", "num_rows", "num_parts", "num_target_parts", "views", "targets"])
def _combine(
    means,  # (P, R, D) float32: E P in P parts, student rows first
    target_means,  # (P', ., D) float32: its target rows; or the means themselves where not DENSE
    sums,  # (R,) float32: of E
    log_sums,  # (R,) float32, log2
    z,  # (n V, D) in the operands' dtype
    weights,  # (n, V, G) float32
    grad,  # (n V, D) float32 out: by the embedding
    meets,  # (R, D) float32 out: what meets E in the gradient by the prototypes
    row_weights,  # (R,) float32 out: the same for the bias
    mixed_rows,  # (n G, D) float32 out, where not DENSE: what meets the targets
    losses,  # (n, blocks of D) float32 out
    num_images,
    num_rows,
    num_parts,
    num_target_parts,
    width,
    views,
    targets,
    inverse_temp,
    LN_2: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, block = tl.program_id(0), tl.program_id(1)
    v, d = tl.arange(0, BLOCK_V), block * BLOCK_D + tl.arange(0, BLOCK_D)
    v_ok, d_ok = v < views, d < width
    ok = v_ok[:, None] & d_ok[None, :]
    rows = image * views + v
    at = rows[:, None].to(tl.int64) * width + d[None, :]
    part_size = tl.cast(num_rows, tl.int64) * width
    mean = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for part in range(num_parts):
        mean += tl.load(means + part * part_size + at, mask=ok, other=0.0)
    share = 1.0 / tl.load(sums + rows, mask=v_ok, other=1.0)
    mean *= share[:, None]
    row = tl.load(z + at, mask=ok, other=0.0).to(tl.float32)
    mix = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for g in range(targets):
        target = image * targets + g
        target_at = tl.cast(target, tl.int64) * width + d
        w = tl.load(weights + rows * targets + g, mask=v_ok, other=0.0)
        of_target = tl.zeros([BLOCK_D], tl.float32)
        for part in range(num_target_parts):
            of_target += tl.load(target_means + part * part_size + target_at, mask=d_ok, other=0.0)
        mixed = tl.sum(w[:, None] * row, axis=0) * inverse_temp
        if DENSE:
            first = num_images * views
            target_share = 1.0 / tl.load(sums + first + target)
            of_target *= target_share
            tl.store(meets + tl.cast(first, tl.int64) * width + target_at, -mixed * target_share, mask=d_ok)
            if block == 0:
                tl.store(row_weights + first + target, -tl.sum(w, axis=0) * target_share * inverse_temp)
        else:
            tl.store(mixed_rows + target_at, mixed, mask=d_ok)
        mix += w[:, None] * of_target[None, :]
        total += w
    tl.store(grad + at, (total[:, None] * mean - mix) * inverse_temp, mask=ok)
    met = total * share * inverse_temp
    tl.store(meets + at, row * met[:, None], mask=ok)
    loss = -tl.sum(tl.sum(row * mix, axis=1), axis=0) * inverse_temp
    if block == 0:
        tl.store(row_weights + rows, met, mask=v_ok)
        log_sum = tl.load(log_sums + rows, mask=v_ok, other=0.0) * LN_2
        loss += tl.sum(total * log_sum, axis=0)
    tl.store(losses + image * tl.num_programs(1) + block, loss)


# ==== launching ====


def row_bounds(
    rows: Tensor, dtype: torch.dtype, longest: Tensor | None = None, largest: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The rows (R, D) in ``dtype``, and (R,) float32 scale (|row| longest + largest) of them; their lengths without ``longest``.

    longest, largest: () float32.
    """
    rows = rows.contiguous()
    bounds = rows.new_empty(len(rows), dtype=torch.float32)
    cast = rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
    _row_bounds[(triton.cdiv(len(rows), ROWS),)](
        rows, cast, bounds, bounds if longest is None else longest, bounds if largest is None else largest,
        len(rows), rows.shape[1], scale,
        CAST=cast is not rows, BOUND=longest is not None, OFFSET=largest is not None, ROWS=ROWS, WIDTH=WIDTH,
    )  # fmt: skip
    return cast, bounds


def anchors(bounds: Tensor, log_sums: Tensor, safe: float) -> Tensor:
    """(R,) the bounds (R,) where they are at most ``safe``, elsewhere log2 of the sum of 2^log_sums (S, R); float32."""
    out = torch.empty_like(bounds)
    splits, rows = log_sums.shape
    _anchors[(triton.cdiv(rows, LINE),)](bounds, log_sums, out, rows, splits, safe, LINE=LINE)
    return out


def row_sums(partial: Tensor, anchors: Tensor, lift: int, sums: Tensor, log_sums: Tensor) -> None:
    """sums (R,) and log_sums (R,) become those of the rows, from ``partial`` (2, S, R) and ``anchors`` (R,); float32."""
    _, slots, rows = partial.shape
    _row_sums[(triton.cdiv(rows, SUMMED_ROWS),)](
        partial, anchors, sums, log_sums, rows, slots, LIFT=lift, ROWS=SUMMED_ROWS, SLOTS=SUMMED_SLOTS
    )


def combine(
    means: Tensor,  # (P, R, D) float32
    target_means: Tensor | None,  # (n G, D) float32 where E has no target rows
    sums: Tensor,  # (R,) float32
    log_sums: Tensor,  # (R,) float32
    z: Tensor,  # (n V, D)
    weights: Tensor,  # (n, V, G) float32
    temp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """() the loss; (n, V, D) its gradient by z; (R, D) and (R,) what meets E in those by prototypes and bias; and (n G, D) what
    meets the targets, where ``target_means`` are given (else of no use). float32.
    """
    (n, views, targets), (parts, rows, d) = weights.shape, means.shape
    grad, meets, row_weights = means.new_empty(n, views, d), means.new_empty(rows, d), means.new_empty(rows)
    mixed = meets if target_means is None else torch.empty_like(target_means)
    block_v = max(2, triton.next_power_of_2(views))
    block_d = max(16, min(triton.next_power_of_2(d), COMBINED // block_v))
    blocks = triton.cdiv(d, block_d)
    losses = means.new_empty(n, blocks)
    dense = target_means is None
    options = {} if knobs.runtime.interpret else dict(num_warps=COMBINED_WARPS)
    _combine[(n, blocks)](
        means, means[:, n * views :] if dense else target_means, sums, log_sums, z, weights,
        grad, meets, row_weights, mixed, losses,
        n, rows, parts, parts if dense else 1, d, views, targets, 1 / temp,
        LN_2=LN_2, DENSE=dense, BLOCK_V=block_v, BLOCK_D=block_d, **options,
    )  # fmt: skip
    return losses.sum(), grad, meets, row_weights, mixed


LN_2 = 0.6931471805599453
