"""What the ranks of a run do together, so that many ranks with a share of a batch each train like one with all of it.

Alone (no process group) every function here gives back what it was given.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import FailureError, MisuseError, first_line
from .signals import ended_when_deaf, uninterrupted

Result = TypeVar("Result")

COMING = timedelta(minutes=5)
"""That ranks wait for each other at the start."""
PATIENCE = 20.0
"""Seconds that a rank waits for the others once it was asked to end."""
ASKED_EVERY = 10
"""Steps after which ranks ask each other whether to stop; fewer where these take longer than ``ANSWERED_WITHIN`` seconds."""
ANSWERED_WITHIN = 2.0
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
_by_itself = False
"""In all threads of this process: a backward pass has its own."""


def refuse_ranks(command: str) -> None:
    """MisuseError under torchrun, of which ``command`` has no use: its ranks would all do the same, and write over each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MisuseError(f"{command} is for one process: start it without torchrun")


def join_ranks() -> Ranks:
    """The process group that torchrun's environment describes, joined; alone without it. NCCL between GPUs, else gloo.

    FailureError: a rank has not come within ``COMING``. torchrun ends the others when one fails at its start, other launchers may
    not, and torch by itself waits for half an hour.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        with ended_when_deaf(ABSENT, 2.0):
            try:
                store, rank, world_size = next(dist.rendezvous("env://", timeout=COMING))
            except dist.DistError as error:
                minutes = COMING.total_seconds() / 60
                raise FailureError(
                    f"not all {os.environ['WORLD_SIZE']} ranks have come within {minutes:g} minutes ({first_line(error)}): look "
                    "at what the others said, and start all of them again"
                ) from None
            store.set_timeout(dist.default_pg_timeout)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return current_ranks()


def current_ranks() -> Ranks:
    """Those that were joined."""
    grouped = dist.is_available() and dist.is_initialized() and not _by_itself
    return Ranks(dist.get_rank(), dist.get_world_size()) if grouped else ALONE


def leave_ranks() -> None:
    """End what ``join_ranks`` joined: NCCL warns about a process that does not."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def whole_steps(ranks: Ranks) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Yields the context manager for a step that happens wholly or not at all: a Ctrl-C ends it with a KeyboardInterrupt once
    it is done, on all ranks.

    Alone, signals outside of a step are taken at once. With other ranks they wait until all have agreed, since those that go on
    would wait in vain for the one that leaves: asked every ``ASKED_EVERY`` steps, answered while the next one runs, or at once
    where steps are slow. All agree on their CPUs: no GPU is waited for.
    """
    if ranks.world_size == 1:
        yield uninterrupted
        return
    with uninterrupted() as held_back, ended_when_deaf(DEAF, PATIENCE):  # ended before what was held back is sent again
        asking = _StopAsked(held_back)

        @contextmanager
        def step() -> Iterator[None]:
            yield
            if asking.after_step():
                raise KeyboardInterrupt

        yield step
        if asking.at_end():
            raise KeyboardInterrupt


class _StopAsked:
    """Whether any rank was asked to stop, in a sum that is under way while a step runs; the same answer on all of them."""

    def __init__(self, held_back: list[int]) -> None:
        self.held_back = held_back
        self.steps_left, self.steps_apart, self.slow = 1, 1, False
        self.question: tuple[Any, Tensor] | None = None
        self.began = time.perf_counter()

    def after_step(self) -> bool:
        asked = self._answered()
        self.steps_left -= 1
        if not (asked or self.steps_left):
            self._ask()
            asked = self.slow and self._answered()
        return asked

    def at_end(self) -> bool:
        """The same after the last step, with what has come since."""
        if self._answered():
            return True
        self._ask()
        return self._answered()

    def _ask(self) -> None:
        now = time.perf_counter()
        answer = torch.tensor([float(len(self.held_back)), (now - self.began) / self.steps_apart])
        self.question = dist.all_reduce(answer, dist.ReduceOp.MAX, async_op=True), answer
        self.began = now

    def _answered(self) -> bool:
        if self.question is None:
            return False
        (work, found), self.question = self.question, None
        work.wait()
        asked, seconds = found.tolist()
        self.slow = seconds > ANSWERED_WITHIN
        self.steps_apart = self.steps_left = max(1, min(ASKED_EVERY, int(ANSWERED_WITHIN / max(seconds, 1e-3))))
        return asked > 0


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


@contextmanager
def by_itself() -> Iterator[None]:
    """Inside, this rank is alone: nothing here waits for another one."""
    global _by_itself
    _by_itself = True
    try:
        yield
    finally:
        _by_itself = False


def from_main(make: Callable[[], Result]) -> Result:
    """What ``make`` gives on rank 0, on all ranks; a MisuseError or FailureError that it ends with there ends it on all.

    What must not differ is looked at by one: ranks on other machines see a file later, or another one.
    """
    ranks = current_ranks()
    if ranks.world_size == 1:
        return make()
    found: list[Any] = [None]
    if ranks.is_main:
        try:
            found = [make()]
        except (MisuseError, FailureError) as error:
            found = [error]
    dist.broadcast_object_list(found, 0)
    if isinstance(found[0], MisuseError | FailureError):
        raise found[0]
    return found[0]


def once_a_machine(work: Callable[[], object]) -> None:
    """Have the first rank of each machine do ``work`` by itself while the others wait: what it compiles they then find on
    disk. Nothing is done where there is one rank."""
    if current_ranks().world_size == 1:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with by_itself():
            work()
    dist.all_reduce(torch.zeros(1))  # on the CPUs: a barrier may ask for a GPU


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
