"""What the ranks of a run do together, so that many ranks with a share of a batch each train like one with all of it.

Alone (no process group) every function here gives back what it was given.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist

from .signals import uninterrupted


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: ``rank`` of ``world_size``, on GPU ``local_rank`` of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The process group that torchrun's environment describes, joined; alone without it. NCCL between GPUs, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank)


def left_together(ranks: Ranks) -> AbstractContextManager[list[int]]:
    """`uninterrupted` where there are other ranks, which would wait in vain for one that leaves: `stop_together` ends them."""
    return nullcontext([]) if ranks.world_size == 1 else uninterrupted()


def stop_together(held_back: list[int], ranks: Ranks) -> None:
    """KeyboardInterrupt on all ranks when signals are ``held_back`` on one: else those that go on wait for it in vain.

    A collective of all ranks, on their CPUs: no GPU is waited for.
    """
    if ranks.world_size == 1:
        return
    signals = torch.tensor(len(held_back))
    torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
    if signals:
        raise KeyboardInterrupt


def leave_ranks() -> None:
    """End what ``join_ranks`` joined: NCCL warns about a process that does not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
