"""Ranks as threads of one process: what they exchange is real, its transport is not."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist


class World:
    """``run(work)`` calls ``work(rank)`` in a thread for each rank, and gives their results."""

    def __init__(self, monkeypatch, size: int) -> None:
        self.size, self.here = size, threading.local()
        self.barrier, self.given = threading.Barrier(size, timeout=20), [None] * size
        for name in ("all_reduce", "all_gather", "broadcast_object_list"):
            monkeypatch.setattr(dist, name, getattr(self, name))
        monkeypatch.setattr(dist, "is_initialized", lambda: hasattr(self.here, "rank"))
        monkeypatch.setattr(dist, "get_rank", lambda: self.here.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def rank(number: int) -> None:
            self.here.rank = number
            try:
                found[number] = work(number)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        assert not errors
        return found

    def exchanged(self, value: Any) -> list[Any]:
        """What every rank gives at this point."""
        self.given[self.here.rank] = value
        self.barrier.wait()
        all_given = list(self.given)
        self.barrier.wait()
        return all_given

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        parts = torch.stack(self.exchanged(tensor.clone()))
        tensor.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))
        return SimpleNamespace(wait=lambda: None)

    def all_gather(self, parts, tensor, group=None):
        for part, given in zip(parts, self.exchanged(tensor.clone()), strict=True):
            part.copy_(given)

    def broadcast_object_list(self, objects, source):
        objects[:] = self.exchanged(list(objects))[source]


def ended_by(work: Callable[[], Any], *errors: type[BaseException]) -> BaseException | None:
    """The error of these that ``work`` ends with."""
    try:
        work()
    except errors as error:
        return error
    return None
