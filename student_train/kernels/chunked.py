"""The prototype cross-entropy in torch, a few images at a time, on any device: what CPU and MPS use, and float64 anywhere.

With z a student row, s = (z P^T + a) / student_temp its logits, p = softmax(s), and w_g its weights against the targets q_g:

    loss   = - sum_g w_g <q_g, log p>, summed over rows
    dlogit = (sum_g w_g) p - sum_g w_g q_g        dz = dlogit P / student_temp        dP = dlogit^T z / student_temp
                                                                                      da = dlogit^T 1 / student_temp

A chunk of images runs through all of it, gradients included, while its logits are still in cache: three matrix products
a student row and nothing recomputed. Backward only scales by the upstream gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .target import EmbeddingTarget, Target, TopKTarget, widened
from .topk import topk_probabilities

CHUNK_BYTES = {"cpu": 8 << 20}
"""Bytes of logits to hold at once, so that on a CPU they stay in its last-level cache. Measured: benchmarks/loss_notes.md."""

OTHER_CHUNK_BYTES = 64 << 20
"""The same on an accelerator, where a chunk must rather be worth a launch."""

FEWEST_ROWS = 96
"""Rows a chunk should have even if they need more bytes: the matrix products slow down below."""


def images_per_chunk(num_images: int, rows_per_image: int, bytes_per_row: int, budget: int) -> int:
    """As many images as a budget of bytes allows, spread evenly over the chunks."""
    most = max(budget // bytes_per_row, FEWEST_ROWS) // rows_per_image
    chunks = -(-num_images // max(1, most))
    return -(-num_images // chunks)


@dataclass(frozen=True)
class _AllProbabilities:
    """q of n images over all the prototypes."""

    q: Tensor  # (n, G, K)

    @classmethod
    def of(cls, target: Target, temp: float, centre: Tensor | None, out: Tensor) -> "_AllProbabilities":
        """q of an embedding or dense target, made in place in ``out`` (at least n*G, K)."""
        n, g = target.num_images, target.num_views
        logits = out[: n * g]
        if isinstance(target, EmbeddingTarget):
            rows = target.embedding.reshape(n * g, -1).to(out.dtype) / temp
            torch.mm(rows, target.matrix.T, out=logits)
        else:
            torch.mul(target.logits.reshape(n * g, -1).to(out.dtype), 1 / temp, out=logits)
        if centre is not None:
            logits.sub_(centre / temp)
        return cls(torch.softmax(logits, dim=1, out=logits).view(n, g, -1))

    def dot(self, log_p: Tensor) -> Tensor:
        """(n, V, G) <q, log p> of every pair, log_p (n, V, K)."""
        return torch.bmm(log_p, self.q.transpose(1, 2))

    def subtract_from(self, p: Tensor, weights: Tensor) -> None:
        """p (n, V, K) -= sum_g weights (n, V, G) q."""
        p.baddbmm_(weights, self.q, alpha=-1)


@dataclass(frozen=True)
class _TopKProbabilities:
    """q of n images: k probabilities, and the one that every other prototype has."""

    ids: Tensor  # (n, G*k)
    at_ids: Tensor  # (n, G, k)
    elsewhere: Tensor  # (n, G)

    @classmethod
    def of(cls, target: TopKTarget, temp: float, centre: Tensor | None, dtype: torch.dtype) -> "_TopKProbabilities":
        at_ids, elsewhere = topk_probabilities(target, temp, centre)
        return cls(target.ids.long().flatten(1), at_ids.to(dtype), elsewhere.to(dtype))

    @property
    def _excess(self) -> Tensor:
        return self.at_ids - self.elsewhere.unsqueeze(2)

    def _ids_for(self, num_student_views: int) -> Tensor:
        return self.ids.unsqueeze(1).expand(-1, num_student_views, -1)

    def dot(self, log_p: Tensor) -> Tensor:
        picked = log_p.gather(2, self._ids_for(log_p.shape[1])).unflatten(2, self.at_ids.shape[1:])
        everywhere = log_p.sum(2, keepdim=True) * self.elsewhere.unsqueeze(1)
        return everywhere + torch.einsum("nvgk,ngk->nvg", picked, self._excess)

    def subtract_from(self, p: Tensor, weights: Tensor) -> None:
        p.sub_((weights * self.elsewhere.unsqueeze(1)).sum(2, keepdim=True))
        at_ids = weights.unsqueeze(3) * self._excess.unsqueeze(1)
        p.scatter_add_(2, self._ids_for(p.shape[1]), -at_ids.flatten(2))


def loss_and_gradients(
    student_embedding: Tensor,  # (B, V, D)
    student_prototypes: Tensor,  # (K, D)
    student_bias: Tensor | None,  # (K,)
    target: Target,
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None,  # (K,)
    pair_weights: Tensor,  # (B, V, G)
    needs_embedding: bool,
    needs_prototypes: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, and its gradients by embedding, prototypes and bias where they are needed, in the wide dtype."""
    (num_images, v, d), k, g = student_embedding.shape, len(student_prototypes), target.num_views
    dtype = widened(torch.promote_types(student_embedding.dtype, student_prototypes.dtype))
    prototypes = student_prototypes.to(dtype)
    weights = pair_weights.to(dtype) / num_images
    centre = None if centre is None else centre.to(dtype)
    bias = None if student_bias is None else student_bias.to(dtype) / student_temp
    if isinstance(target, EmbeddingTarget):  # cast once, not once a chunk
        target = EmbeddingTarget(target.embedding, target.matrix.to(dtype))

    dense_views = 0 if isinstance(target, TopKTarget) else g
    budget = CHUNK_BYTES.get(prototypes.device.type, OTHER_CHUNK_BYTES)
    n = images_per_chunk(num_images, v + dense_views, k * dtype.itemsize, budget)
    student_logits, target_logits = prototypes.new_empty(n * v, k), prototypes.new_empty(n * dense_views, k)
    loss = prototypes.new_zeros(())
    grad_embedding = prototypes.new_empty(num_images, v, d) if needs_embedding else None
    grad_prototypes = torch.zeros_like(prototypes) if needs_prototypes else None
    grad_bias = prototypes.new_zeros(k) if needs_bias else None

    for start in range(0, num_images, n):
        chunk = slice(start, min(start + n, num_images))
        z = student_embedding[chunk].reshape(-1, d).to(dtype) / student_temp
        w, part = weights[chunk], target.images(chunk.start, chunk.stop)
        if isinstance(part, TopKTarget):
            q = _TopKProbabilities.of(part, teacher_temp, centre, dtype)
        else:
            q = _AllProbabilities.of(part, teacher_temp, centre, out=target_logits)

        rows = torch.mm(z, prototypes.T, out=student_logits[: len(z)])
        if bias is not None:
            rows.add_(bias)
        by_image = rows.view(-1, v, k)
        torch.log_softmax(rows, dim=1, out=rows)
        loss -= (w * q.dot(by_image)).sum()
        if needs_embedding or needs_prototypes or needs_bias:
            by_image.exp_().mul_(w.sum(2, keepdim=True))
            q.subtract_from(by_image, w)
        if grad_embedding is not None:
            torch.mm(rows, prototypes, out=grad_embedding[chunk].view(-1, d)).div_(student_temp)
        if grad_prototypes is not None:
            grad_prototypes.addmm_(rows.T, z)
        if grad_bias is not None:
            grad_bias.add_(rows.sum(0), alpha=1 / student_temp)
    return loss, grad_embedding, grad_prototypes, grad_bias


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embedding, prototypes, bias, *rest):
        ctx.save_for_backward(embedding, prototypes, bias)
        ctx.rest = rest
        loss, *ctx.gradients = loss_and_gradients(embedding, prototypes, bias, *rest, *ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's signature)
        (upstream,) = grad_outputs
        inputs = ctx.saved_tensors
        if ctx.gradients is None:  # a second backward through a retained graph: the first gave the buffers away
            _, *ctx.gradients = loss_and_gradients(*inputs, *ctx.rest, *ctx.needs_input_grad[:3])
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(upstream).to(tensor.dtype)
            for tensor, gradient in zip(inputs, gradients, strict=True)
        )
        return *scaled, *(None for _ in ctx.rest)


def prototype_cross_entropy(
    student_embedding: Tensor,
    student_prototypes: Tensor,
    target: Target,
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None,
    pair_weights: Tensor,
    student_bias: Tensor | None = None,
) -> Tensor:
    """As reference.prototype_cross_entropy; pair_weights (V, G) or (B, V, G)."""
    weights = pair_weights.expand(len(student_embedding), -1, -1)
    return _ChunkedCrossEntropy.apply(
        student_embedding, student_prototypes, student_bias, target, student_temp, teacher_temp, centre, weights
    )
