"""What the ranks of a run do together, so that many ranks with a share of a batch each train like one with all of it.

Alone (no process group) every function here gives back what it was given.
"""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def normalise_together(model: nn.Module, device: torch.device) -> None:
    """Make the BatchNorms inside ``model`` go by the joined batch, as DINO, SwAV and MSN train. On CUDA alone: torch has none
    for CPUs, where every rank goes by its own share.
    """
    if world_size() > 1 and device.type == "cuda":
        convert_sync_batchnorm(model)


@torch.no_grad()
def joined(rows: Tensor) -> Tensor:
    """(n, ...) rows of every rank -> (n * world size, ...), rank 0's first, the same on all of them. No gradient."""
    if world_size() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, the same on all of them.

    The gradient passes to this rank's values unscaled: DistributedDataParallel takes the mean over ranks afterwards.
    """
    return values if world_size() == 1 else _MeanOverRanks.apply(values)  # type: ignore[return-value]


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0]
