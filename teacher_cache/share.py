"""Which shards of a store are this worker's to make.

Workers do not talk to each other: what lies under the store's pending/ says what is done and what somebody is at.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..common.errors import FailureError, MisuseError
from ..common.files import is_at, lock, open_locked, unlock
from ..common.places import place_of
from ..common.store.manifest import StoreManifest
from ..common.store.writer import StoreWriter

WAIT = 0.2
"""Seconds between two looks at what other workers have done."""


@dataclass(frozen=True)
class Share:
    """This worker's share of the shards: of every ``parts`` the one numbered ``part``. One that ``helps`` then makes what others
    have not begun, and waits for them; one that does not ends with its own.

    ``split`` is what workers must agree on that write one store at the same time; None: this one is alone.
    """

    part: int = 0
    parts: int = 1
    helps: bool = True
    split: str | None = None

    @classmethod
    def of(cls, part: str | None) -> Self:
        """What the setting ``part`` says, else what torchrun's environment does. MisuseError: it is none, or both are there."""
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if part is None:
            return cls(rank, ranks, split="ranks" if ranks > 1 else None)
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise MisuseError(
                f"`part` {part!r} is none: give K/N with K from 1 to N, such as 3/64 in the third of 64 jobs"
            )
        if ranks > 1:
            raise MisuseError(
                "`part` is for jobs that do not know of each other; the ranks of torchrun share without it"
            )
        return cls(int(found[1]) - 1, int(found[2]), helps=False, split=f"a part of {int(found[2])}")

    def of_all(self) -> Self:
        """The same worker, which leaves nothing to those who have ended."""
        return replace(self, helps=True)

    def own(self, shards: Sequence[int]) -> list[int]:
        """Those of ``shards`` that are this worker's."""
        return [shard for shard in shards if shard % self.parts == self.part]

    def join(self, path: Path, manifest: StoreManifest) -> StoreWriter | None:
        """`StoreWriter.open_or_resume`; None where other workers have finished the store meanwhile."""
        try:
            return StoreWriter.open_or_resume(path, manifest, self.split)
        except (MisuseError, FileNotFoundError):  # also of what lay under pending/ a moment ago
            if self.split is None or not place_of(path).exists("zarr.json"):
                raise
            return None

    def runs(self, writer: StoreWriter) -> Iterator[list[int]]:
        """Lists of shards to be made one after another, of which the first is claimed, until there is nothing left to do. Whoever
        cannot claim a later one takes the next list. An empty one: there is nothing to do but to wait.
        """
        while own := self.own(writer.missing()):
            free = next((at for at, shard in enumerate(own) if writer.claim(shard) is not None), None)
            if free is None:
                break  # another process has each of them
            yield own[free:]
        while self.helps and (missing := writer.missing()):
            # From the end: those that their own worker would come to last.
            free = next((shard for shard in reversed(missing) if writer.claim(shard) is not None), None)
            if free is not None:
                yield [free]
            elif writer.missing():
                time.sleep(WAIT)
                yield []


ALONE = Share()


def beside(out: Path, embeddings: Path) -> AbstractContextManager[None]:
    """``embeddings`` lie beside the store ``out`` while it is made, and go once it is whole, with the last worker to leave:
    another may have found it unfinished just now."""
    if not place_of(out).has_locks:
        return _beside_in_a_bucket(out, embeddings)
    return together(
        out,
        lambda: (out / "zarr.json").exists() or not embeddings.exists(),
        lambda: shutil.rmtree(embeddings, ignore_errors=True),
    )


@contextmanager
def _beside_in_a_bucket(out: Path, embeddings: Path) -> Iterator[None]:
    """Workers do not see each other there: the first to find ``out`` whole drops them, and what others then do not find does not
    matter any more."""
    place = place_of(out)
    before = place.exists("zarr.json")
    try:
        yield
    except (MisuseError, FailureError, FileNotFoundError):
        if before or not place.exists("zarr.json"):
            raise
    if place.exists("zarr.json"):
        place_of(embeddings).remove_all()


@contextmanager
def together(
    out: Path, done: Callable[[], bool], last: Callable[[], None], first: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside, any number of workers are at the store ``out``. Who enters while there is nobody else calls ``first``, and the last
    to leave, if all is ``done``, ``last``; neither is called while somebody else is inside."""
    place = out.with_name(f".{out.name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    while (held := open_locked(place, shared=True)) is None:
        time.sleep(WAIT)
    try:
        if lock(held):
            first()
            lock(held, shared=True)
        yield
    finally:
        unlock(held)  # two who leave together would each be kept from an exclusive lock by the other's shared one
        # Asked with the lock held: whoever left at the same time may have done what was left, and removed the lock's file.
        if lock(held) and is_at(place, held) and done():
            last()
            place.unlink(missing_ok=True)
        os.close(held)
