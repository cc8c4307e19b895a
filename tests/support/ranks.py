"""Functions on several ranks, in processes that are forked from one that has imported torch: a start costs seconds otherwise."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing

from rob.common.ranks import leave_ranks

multiprocessing.set_forkserver_preload(["torch", "rob.student_train.objectives", "rob.teacher_cache.cache"])


def on_ranks(function: Callable[..., None], folder: Path, ranks: int = 2) -> None:
    """``function(rank, str(folder))`` on so many ranks, joined by gloo. The function can be imported by its name."""
    torch.multiprocessing.start_processes(
        _joined, (function, str(folder), ranks), nprocs=ranks, start_method="forkserver"
    )


def _joined(rank: int, function: Callable[..., None], folder: str, ranks: int) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    function(rank, folder)
    leave_ranks()
