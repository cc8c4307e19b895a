"""What the ranks of a run do together, so that many ranks with a share of a batch each train like one with all of it.

Alone (no process group) every function here gives back what it was given.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist

from .errors import FailureError
from .signals import ended_when_deaf, uninterrupted

PATIENCE = 20.0
"""Seconds that a rank waits for the others once it was asked to end."""
DEAF = "another rank does not answer: ended without saving, and the last checkpoint is kept"
ABSENT = "ended while it waited for the other ranks to come"
LOST = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Socket Timeout|timed out", re.IGNORECASE)
"""What torch says when another rank has gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started: ``rank`` of ``world_size``."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0


ALONE = Ranks()


def join_ranks() -> Ranks:
    """The process group that torchrun's environment describes, joined; alone without it. NCCL between GPUs, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        with ended_when_deaf(ABSENT, 2.0):  # torch waits half an hour for ranks that have died
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return current_ranks()


def current_ranks() -> Ranks:
    """Those that were joined."""
    grouped = dist.is_available() and dist.is_initialized()
    return Ranks(dist.get_rank(), dist.get_world_size()) if grouped else ALONE


def leave_ranks() -> None:
    """End what ``join_ranks`` joined: NCCL warns about a process that does not."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def whole_steps(ranks: Ranks) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Yields the context manager for a step that happens wholly or not at all: a Ctrl-C ends it with a KeyboardInterrupt once
    it is done, on all ranks.

    Alone, signals outside of a step are taken at once. With other ranks they wait for the end of the next step, since
    those that go on would wait in vain for the one that leaves. All agree on their CPUs: no GPU is waited for.
    """
    if ranks.world_size == 1:
        yield uninterrupted
        return
    with uninterrupted() as held_back, ended_when_deaf(DEAF, PATIENCE):  # ended before what was held back is sent again

        @contextmanager
        def step() -> Iterator[None]:
            yield
            signals = torch.tensor(len(held_back))
            dist.all_reduce(signals, dist.ReduceOp.MAX)
            if signals:
                raise KeyboardInterrupt

        yield step


@contextmanager
def lost_ranks_are_a_failure() -> Iterator[None]:
    """FailureError where another rank dies, which torch reports in the words of its transport."""
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError and DistNetworkError are of it
        if os.environ.get("WORLD_SIZE", "1") == "1" or not LOST.search(str(error)):
            raise
        rank = os.environ.get("RANK", "0")
        raise FailureError(
            f"rank {rank} has lost another rank, which was killed or cannot be reached: start all again, and the run goes "
            "on from its last checkpoint"
        ) from error


def normalise_together(model: nn.Module, device: torch.device) -> None:
    """Make the BatchNorms inside ``model`` go by the joined batch, as DINO, SwAV and MSN train. On CUDA alone: torch has none
    for CPUs, where every rank goes by its own share.
    """
    if current_ranks().world_size > 1 and device.type == "cuda":
        convert_sync_batchnorm(model)


@torch.no_grad()
def joined(rows: Tensor) -> Tensor:
    """(n, ...) rows of every rank -> (n * world size, ...), rank 0's first, the same on all of them. No gradient."""
    world_size = current_ranks().world_size
    if world_size == 1:
        return rows.detach()
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size)]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, the same on all of them.

    The gradient passes to this rank's values unscaled: DistributedDataParallel takes the mean over ranks afterwards.
    """
    alone = current_ranks().world_size == 1
    return values if alone else _MeanOverRanks.apply(values)  # type: ignore[return-value]


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0]
