"""The stopwatch, on a clock of the test's own."""

import pytest
import torch

from rob.common import timing
from rob.common.timing import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_seconds_add_up_by_name(clock):
    stopwatch = Stopwatch(torch.device("cpu"))
    for seconds in (1.0, 2.0):
        with stopwatch("data"):
            clock.now += seconds
        with stopwatch("student"):
            clock.now += 4.0
        clock.now += 0.5
    assert stopwatch.take() == ({"data": 3.0, "student": 8.0}, 12.0)


def test_taking_starts_afresh(clock):
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch("data"):
        clock.now += 1.0
    taken, _ = stopwatch.take()
    with stopwatch("data"):
        clock.now += 2.0
    assert stopwatch.take() == ({"data": 2.0}, 2.0)
    assert taken == {"data": 1.0}
    assert stopwatch.take() == ({}, 0.0)


def test_time_until_an_error_counts(clock):
    stopwatch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError), stopwatch("data"):
        clock.now += 1.0
        raise ValueError
    assert stopwatch.take() == ({"data": 1.0}, 1.0)


@pytest.mark.parametrize(("device", "synchronise", "waits"), [("cuda", True, 5), ("cuda", False, 0), ("cpu", True, 0)])
def test_only_a_gpu_is_waited_for_and_only_when_asked(monkeypatch, device, synchronise, waits):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(True))
    stopwatch = Stopwatch(torch.device(device), synchronise)
    for name in ("data", "student"):
        with stopwatch(name):
            pass
    stopwatch.take()
    assert len(calls) == waits
