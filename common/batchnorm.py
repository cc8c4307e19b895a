"""BatchNorm over the joined batch of the ranks of a machine.

The mathematics and, on CUDA, the kernels of torch's ``SyncBatchNorm``, which in every layer asks the GPU which ranks had no
images, and waits for the answer. Here all ranks have as many, as every step of a run does: nothing is asked. CPUs have it, too.
"""

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .ranks import current_ranks

CARRIED = ("act", "drop")
"""What timm's BatchNorms do after the normalisation."""


def join_batchnorms(model: nn.Module) -> None:
    """Make the BatchNorms inside ``model`` go by the joined batch of this machine's ranks; parameters, buffers and their names
    stay what they are. Nothing changes where there is one rank."""
    if current_ranks().world_size == 1:
        return
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, _BatchNorm) and not isinstance(layer, JoinedBatchNorm):
                setattr(parent, name, JoinedBatchNorm.of(layer))


class JoinedBatchNorm(_BatchNorm):
    """(N, C, ...) of each rank, as many rows on all of them, normalised by mean and variance over all their rows."""

    act: nn.Module
    drop: nn.Module

    @classmethod
    def of(cls, layer: _BatchNorm) -> "JoinedBatchNorm":
        """In place of ``layer``, with its very parameters and buffers."""
        joined = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name, value in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            setattr(joined, name, value)
        for name in CARRIED:
            setattr(joined, name, getattr(layer, name, nn.Identity()))
        return joined.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        joined = self.training and current_ranks().world_size > 1
        found = self._joined(input) if joined else super().forward(input)  # type: ignore (what disable is typed as)
        return self.act(self.drop(found))

    @torch.compiler.disable  # what passes between ranks is for no compiler
    def _joined(self, x: Tensor) -> Tensor:
        momentum = self.momentum or 0.0
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        group, ranks = machine_group(current_ranks().world_size)
        running = (self.running_mean, self.running_var, momentum)
        return _Joined.apply(x, self.weight, self.bias, running, self.eps, group, ranks)  # type: ignore[return-value]

    def _check_input_dim(self, input: Tensor) -> None:
        """Any."""


@cache
def machine_group(world_size: int) -> tuple[Any, int]:
    """The process group of this machine's ranks, and how many they are; all ranks, where machines have unlike numbers."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if here >= world_size or world_size % here:
        return None, world_size
    return dist.new_subgroups(here)[0], here


class _Joined(torch.autograd.Function):
    """Its backward pass sums two vectors over the ranks, as the forward pass did; DistributedDataParallel takes the mean of the
    weights' gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, running, eps, group, ranks):
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        mean, invstd = statistics(x, eps)
        both = torch.cat([mean, invstd])
        parts = both.new_empty(ranks, 2, len(mean))
        dist.all_gather(list(parts.view(ranks, -1)), both, group)
        mean, invstd = gathered_statistics(x, parts[:, 0].contiguous(), parts[:, 1].contiguous(), running, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.group, ctx.ranks = group, ranks
        return normalised(x, weight, bias, mean, invstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's signature)
        (upstream,) = gradients
        x, weight, mean, invstd = ctx.saved_tensors
        if not upstream.is_contiguous(memory_format=torch.channels_last):
            upstream = upstream.contiguous()
        sums, by_weight, by_bias = reduced(upstream, x, weight, mean, invstd)
        if not ctx.needs_input_grad[0]:
            return None, by_weight, by_bias, None, None, None, None
        dist.all_reduce(sums, group=ctx.group)
        by_input = input_gradient(upstream, x, weight, mean, invstd, sums, ctx.ranks)
        return by_input, by_weight, by_bias, None, None, None, None


# ==== one pass over the activations each: torch's kernels on CUDA, which CPUs do not have ====


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(C,) mean and 1 / sqrt(variance + eps) of this rank's rows, float32."""
    if x.is_cuda:
        return torch.batch_norm_stats(x, eps)
    variance, mean = torch.var_mean(x.float(), _rows(x), correction=0)
    return mean, (variance + eps).rsqrt()


def gathered_statistics(x: Tensor, means: Tensor, invstds: Tensor, running: tuple, eps: float) -> tuple[Tensor, Tensor]:
    """The same of all ranks' rows, from (ranks, C) of each; ``running``: mean and variance, which move there by the third."""
    running_mean, running_var, momentum = running
    rows = x.numel() // x.shape[1]
    if x.is_cuda:
        counts = means.new_full((len(means),), rows)
        return torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts
        )
    mean = means.mean(0)
    variance = (invstds**-2 - eps).mean(0) + means.var(0, correction=0)
    if running_mean is not None:
        total = rows * len(means)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * total / (total - 1)).to(running_var.dtype), momentum)
    return mean, (variance + eps).rsqrt()


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float):
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
    return F.batch_norm(x, mean, invstd**-2 - eps, weight, bias, training=False, eps=eps)


def reduced(upstream: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor):
    """(2, C) sums over this rank's rows of the gradient, and of it times (x - mean); gradients by weight and by bias."""
    affine = weight is not None
    if x.is_cuda:
        of_gradient, of_product, by_weight, by_bias = torch.batch_norm_backward_reduce(
            upstream, x, mean, invstd, weight, True, affine, affine
        )
        return torch.stack([of_gradient, of_product]), by_weight if affine else None, by_bias if affine else None
    gradient, centred = upstream.float(), x.float() - _channels(mean, x)
    sums = torch.stack([gradient.sum(_rows(x)), (gradient * centred).sum(_rows(x))])
    return (
        sums,
        (sums[1] * invstd).to(weight.dtype) if affine else None,
        sums[0].to(weight.dtype, copy=True) if affine else None,
    )


def input_gradient(
    upstream: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, sums: Tensor, ranks: int
) -> Tensor:
    """The gradient by x; ``sums`` as of ``reduced``, over all ranks."""
    rows = x.numel() // x.shape[1]
    if x.is_cuda:
        counts = torch.full((ranks,), rows, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(upstream, x, mean, invstd, weight, sums[0], sums[1], counts)
    of_gradient, of_product = sums / (rows * ranks)
    centred = (x.float() - _channels(mean, x)) * _channels(invstd**2 * of_product, x)
    scale = invstd if weight is None else invstd * weight.float()
    return ((upstream.float() - _channels(of_gradient, x) - centred) * _channels(scale, x)).to(x.dtype)


def _rows(x: Tensor) -> list[int]:
    return [dimension for dimension in range(x.ndim) if dimension != 1]


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))
