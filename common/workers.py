"""Threads for compiled code, which runs outside the GIL."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

_first_calls = threading.Lock()
_compiled: set[str] = set()


class Workers:
    """A pool of ``threads`` threads for one kind of work, by ``name``.

    numba's dispatchers do not bear being called for the first time by several threads at once: the first work of each name
    in a process is done by the caller alone.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads, self.name = threads, name
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def run(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Call ``work`` with every item; raises what it raises."""
        if self.name in _compiled:
            for _ in self._pool.map(work, items):
                pass
            return
        with _first_calls:
            for item in items:
                work(item)
                _compiled.add(self.name)

    def slices(self, length: int) -> range:
        """Starts of the slices to cut so many rows into: small enough that the last one keeps nobody waiting."""
        return range(0, length, max(1, -(-length // (4 * self.threads))))
