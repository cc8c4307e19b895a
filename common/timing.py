"""Where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by name. With ``synchronise`` it waits for the CUDA device at both ends, so that queued work is counted
    where it belongs; without, it measures only how long the host was kept, and costs nothing.
    """

    def __init__(self, device: torch.device, synchronise: bool = False) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait = torch.cuda.synchronize if synchronise and device.type == "cuda" else lambda: None
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> tuple[dict[str, float], float]:
        """The seconds by name since the last call, and the seconds that passed in all."""
        self._wait()
        now = time.perf_counter()
        taken, passed = dict(self.seconds), now - self._started
        self.seconds.clear()
        self._started = now
        return taken, passed
