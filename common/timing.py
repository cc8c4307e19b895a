"""Where the time of a step goes, and how long one call takes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

MIN_CALLS = 20
"""Timed calls, after three that are not."""
MIN_SECONDS = 1.0
"""For which they go on at least."""


def median_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call that returns when its work is done."""
    times: list[float] = []
    for _ in range(3):
        call()
    end = time.perf_counter() + MIN_SECONDS
    while len(times) < MIN_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


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
