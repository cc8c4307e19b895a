"""The prototype cross-entropy on CUDA: exponentials once, in half precision, and products by the library around them.

With z a student row, P the student's prototypes, a their bias and w the pair weights, all that the loss needs of a target q is
the mean of the prototypes and of the bias under it: <q, s> = (z . (q P) + q . a) / student_temp. So, per image,

    mix_v   = sum_g w[v,g] q_g P               W_v = sum_g w[v,g]
    loss    = sum_v W_v logsumexp(s_v) - (z_v . mix_v + sum_g w[v,g] q_g . a) / student_temp
    dz_v    = (W_v p_v P - mix_v) / student_temp
    dP      = sum_v W_v p_v^T z_v / student_temp - sum_g q_g^T (sum_v w[v,g] z_v) / student_temp

E holds what p and q of a chunk of images are before they are divided by their sums, student rows above target rows. Then E P is
all the means, and E^T R all of dP, with R the rows that meet them, their weights and sums included. E is made by

    `tiled`     the kernel `exponentials`: the product and what follows it in one pass, relative to an anchor |z| max |P| / temp.
                Where that bound is not safe, as with rows of any length, `log_sum_exp` finds the row's own first.
    otherwise   the library's product into float32 logits, a block of rows at a time, and the kernel `softmax_rows`.

Three products a student row either way. A top-k target needs none: k prototypes are gathered, and the rest share one sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked
from .frozen import cast_of, largest_norm
from .products import long_product, product
from .target import DenseTarget, EmbeddingTarget, Target, TopKTarget
from .topk import add_topk_gradient_, topk_means, topk_probabilities
from .triton_kernels import SAFE, exponentials, lift, log_sum_exp, softmax_rows
from .triton_passes import LN_2, anchors, combine, row_bounds, row_sums

MEMORY_SHARE = 64
"""E may take this part of the device's memory: more images go in chunks, each of which adds to dP once more."""

SMALLEST_BUDGET = 256 << 20
"""Bytes that E may take on any device."""

LOGITS_BYTES = 64 << 20
"""Bytes of float32 logits that the untiled form holds at once: few, so that they are read back from cache."""


def chunk_bytes(device: torch.device) -> int:
    """The budget of E."""
    if device.type != "cuda":
        return SMALLEST_BUDGET
    return max(SMALLEST_BUDGET, torch.cuda.get_device_properties(device).total_memory // MEMORY_SHARE)


@dataclass(frozen=True)
class Scores:
    """What scores rows: prototypes, an offset a prototype, a temperature."""

    keys: Tensor  # (K, D)
    longest: Tensor | None  # () float32 length of the longest, where tiled
    offset: Tensor | None  # (K,) float32
    temp: float
    tiled: bool

    def fill(self, rows: Tensor, out: Tensor, sums: Tensor, log_sums: Tensor) -> Tensor:
        """out (R, K) becomes the exponentials of the rows (R, D), sums (R,) what to divide them by to get the softmax, and
        log_sums (R,) log2 of the logits' sum of exponentials, float32 both; returns the rows in the keys' dtype."""
        scale = 1 / (LN_2 * self.temp)
        if not self.tiled:
            most = max(64, LOGITS_BYTES // (4 * len(self.keys)))
            rows = rows.to(self.keys.dtype).contiguous()
            parts = (tensor.split(most) for tensor in (rows, out, sums, log_sums))
            for block, *made in zip(*parts, strict=True):
                softmax_rows(product(block, self.keys.T), self.offset, scale, *made)
            return rows
        largest = None if self.offset is None else torch.linalg.vector_norm(self.offset, torch.inf)
        rows, bounds = row_bounds(rows, self.keys.dtype, self.longest, largest, scale)
        safe = SAFE if out.dtype != torch.float16 else -1.0  # float16 holds nothing far below its row's largest
        own = log_sum_exp(rows, self.keys, self.offset, bounds, scale, safe)
        anchor = anchors(bounds, own, safe)
        partial = exponentials(rows, self.keys, self.offset, anchor, scale, out)
        row_sums(partial, anchor, lift(out.dtype), sums, log_sums)
        return rows


def _two_halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 2) columns of ``dtype`` whose sum is x (N,) to twice its digits."""
    high = x.to(dtype)
    return torch.stack([high, (x - high.float()).to(dtype)], dim=1)


@dataclass(frozen=True)
class Problem:
    """All of the loss but its images: prepared once a call."""

    prototypes: Tensor  # (K, D) in the operands' dtype
    longest: Tensor | None  # () float32 length of the longest, where tiled
    bias: Tensor | None  # (K,) float32
    centre: Tensor | None  # (K,) float32
    student_temp: float
    teacher_temp: float
    tiled: bool

    def chunk(self, embedding: Tensor, target: Target, weights: Tensor) -> "Chunk":
        """embedding (n, V, D); weights (n, V, G) float32, contiguous."""
        (n, v, d), g, k = embedding.shape, target.num_views, len(self.prototypes)
        dtype, rows = self.prototypes.dtype, embedding.reshape(n * v, d)
        sparse = isinstance(target, TopKTarget)
        padded = 64 * -(-k // 64)  # rows that begin at a line of cache
        e = self.prototypes.new_empty(n * (v + (0 if sparse else g)), padded)[:, :k]
        sums, log_sums = rows.new_empty(2, len(e), dtype=torch.float32)
        student, rest = slice(0, n * v), slice(n * v, None)
        scores = Scores(self.prototypes, self.longest, self.bias, self.student_temp, self.tiled)
        z = scores.fill(rows, e[student], sums[student], log_sums[student])
        topk = target_means = None
        match target:
            case EmbeddingTarget():
                half = target.embedding.element_size() == 2 and dtype.itemsize == 2
                target_dtype = target.embedding.dtype if half else dtype
                keys = cast_of(target.matrix, target_dtype)
                longest = largest_norm(keys) if self.tiled else None
                scores = Scores(keys, longest, self._offset, self.teacher_temp, self.tiled)
                scores.fill(target.embedding.reshape(n * g, -1), e[rest], sums[rest], log_sums[rest])
            case DenseTarget():
                rows, scale = target.logits.reshape(n * g, -1), 1 / (LN_2 * self.teacher_temp)
                softmax_rows(rows, self._offset, scale, e[rest], sums[rest], log_sums[rest])
            case _:
                topk = target.ids, *topk_probabilities(target, self.teacher_temp, self.centre)
                target_means = topk_means(*topk, self.prototypes).flatten(0, 1)
        means = long_product(e, self.prototypes)
        loss, grad, meets, row_weights, mixed = combine(
            means, target_means, sums, log_sums, z, weights, self.student_temp
        )
        if self.bias is not None:
            of_bias = self._bias_means(e[rest], sums[rest], topk, n, g)
            loss = loss - (weights.sum(1) * of_bias).sum() / self.student_temp
        return Chunk(loss, grad, e, meets, row_weights, topk and (*topk, mixed, weights.sum(1) / self.student_temp))

    @property
    def _offset(self) -> Tensor | None:
        return None if self.centre is None else -self.centre

    def _bias_means(self, e: Tensor, sums: Tensor, topk, n: int, g: int) -> Tensor:
        """(n, G) mean of the bias under the target."""
        assert self.bias is not None
        if topk is None:
            return (product(e, _two_halves(self.bias, e.dtype)).sum(1) / sums).view(n, g)
        ids, at_ids, elsewhere = topk
        return topk_means(ids, at_ids, elsewhere, self.bias.unsqueeze(1)).squeeze(2)


@dataclass(frozen=True)
class Chunk:
    """What some images add to the loss and its gradients."""

    loss: Tensor  # ()
    grad_embedding: Tensor  # (n, V, D) float32
    e: Tensor  # (R, K)
    meets: Tensor  # (R, D) float32, R of the module's docstring
    row_weights: Tensor  # (R,) float32, the same for the bias
    # A top-k target's own: ids, at_ids, elsewhere, and what they meet, (n * G, D) and (n, G).
    topk: tuple[Tensor, ...] | None

    def grad_prototypes(self, upstream: Tensor | float = 1.0) -> Tensor:
        """(K, D) float32."""
        half = self.e.dtype == torch.bfloat16
        rows = torch.mul(self.meets, upstream, out=torch.empty_like(self.meets, dtype=self.e.dtype if half else None))
        gradient = _times_rows(self.e, rows)
        if self.topk is not None:
            ids, at_ids, elsewhere, mixed, _ = self.topk
            add_topk_gradient_(gradient, ids, at_ids, elsewhere, mixed * -upstream)
        return gradient

    def grad_bias(self, upstream: Tensor | float = 1.0) -> Tensor:
        """(K,) float32."""
        weights = self.row_weights * upstream
        if self.e.dtype == torch.float32:
            gradient = product(self.e.T, weights.unsqueeze(1))
        else:
            largest = weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            gradient = product(self.e.T, _two_halves(weights / largest, self.e.dtype)).sum(1, keepdim=True) * largest
        if self.topk is not None:
            ids, at_ids, elsewhere, _, met = self.topk
            add_topk_gradient_(gradient, ids, at_ids, elsewhere, met.reshape(-1, 1) * -upstream)
        return gradient.squeeze(1)


def _times_rows(e: Tensor, rows: Tensor) -> Tensor:
    """(K, D) e^T rows. float16 gets rows of at most 1: they are of the order 1 / (B V)."""
    if e.dtype != torch.float16:
        return product(e.T, rows)
    largest = rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return product(e.T, (rows / largest).half()).mul_(largest)


class _TritonCrossEntropy(torch.autograd.Function):
    """The last chunk's part of dP is left to the backward pass, where the upstream gradient costs R x D and not K x D."""

    @staticmethod
    def forward(ctx, embedding, prototypes, bias, target, student_temp, teacher_temp, centre, weights, dtype, tiled):
        ctx.dtypes = [None if t is None else t.dtype for t in (embedding, prototypes, bias)]
        (b, v, _), k, dense_views = (
            embedding.shape,
            len(prototypes),
            0 if isinstance(target, TopKTarget) else target.num_views,
        )
        longest = None
        if tiled:
            prototypes, lengths = row_bounds(prototypes, dtype)
            longest = lengths.max()
        problem = Problem(
            prototypes.to(dtype).contiguous(),
            longest,
            None if bias is None else bias.float().contiguous(),
            None if centre is None else centre.float().contiguous(),
            student_temp,
            teacher_temp,
            tiled,
        )
        weights = (weights.float() / b).contiguous()
        n = chunked.images_per_chunk(b, v + dense_views, k * dtype.itemsize, chunk_bytes(embedding.device))
        loss, grads, done, chunk = 0.0, [], None, None
        for start in range(0, b, n):
            if chunk is not None:
                done = _added(done, chunk, ctx.needs_input_grad)
            stop = min(start + n, b)
            chunk = None  # its memory is the next one's
            chunk = problem.chunk(embedding[start:stop], target.images(start, stop), weights[start:stop])
            loss = loss + chunk.loss
            grads.append(chunk.grad_embedding)
        assert chunk is not None
        if ctx.needs_input_grad[0]:
            ctx.grad_embedding = torch.cat(grads) if len(grads) > 1 else grads[0]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            ctx.save_for_backward(chunk.e, chunk.meets, chunk.row_weights, *(chunk.topk or ()))
            ctx.done = done
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's signature)
        (upstream,) = grad_outputs
        gradients: list[Tensor | None] = [None, None, None]
        with torch.autocast(upstream.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                gradients[0] = ctx.grad_embedding * upstream
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                e, meets, row_weights, *topk = ctx.saved_tensors
                last = Chunk(upstream, meets, e, meets, row_weights, tuple(topk) or None)
                if ctx.needs_input_grad[1]:
                    gradients[1] = last.grad_prototypes(upstream)
                if ctx.needs_input_grad[2]:
                    gradients[2] = last.grad_bias(upstream)
                for index, before in enumerate(ctx.done or (), start=1):
                    if before is not None and (own := gradients[index]) is not None:
                        own.add_(before * upstream)
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *cast, *(None for _ in range(7))


def _added(done, chunk: Chunk, needs: tuple[bool, ...]):
    """The gradients by prototypes and bias so far, and this chunk's."""
    more = [chunk.grad_prototypes() if needs[1] else None, chunk.grad_bias() if needs[2] else None]
    if done is None:
        return more
    return [None if new is None else old.add_(new) for old, new in zip(done, more, strict=True)]


def prototype_cross_entropy(
    student_embedding: Tensor,
    student_prototypes: Tensor,
    target: Target,
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None,
    pair_weights: Tensor,
    student_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tiled: bool = True,
) -> Tensor:
    """As reference.prototype_cross_entropy, accumulated in float32.

    dtype: what the tensor cores multiply, float32 or half; None for that of the embedding and prototypes.
    tiled: whether the logits are made by the kernel `exponentials`, or by the library.
    """
    dtype = dtype or torch.promote_types(student_embedding.dtype, student_prototypes.dtype)
    weights = pair_weights.expand(len(student_embedding), -1, -1)
    return _TritonCrossEntropy.apply(
        student_embedding,
        student_prototypes,
        student_bias,
        target,
        student_temp,
        teacher_temp,
        centre,
        weights,
        dtype,
        tiled,
    )
