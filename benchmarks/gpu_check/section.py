"""What every section of the check has: a device, sizes, a deadline, and a way to say what it found."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


class NotHere(Exception):
    """A section that this machine cannot run, and why: neither passed nor failed."""


@dataclass
class Section:
    """One section under way: where it runs, how large, until when, and what it found so far.

    ``toy`` sizes exercise the logic on a CPU; ``quick`` ones are for 90 seconds in all. ``data`` holds what ``images.py`` made,
    or makes at this moment.
    """

    name: str
    device: torch.device
    data: Path
    seconds: float
    toy: bool = False
    quick: bool = False
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    said: Callable[["Section"], None] = lambda section: None
    """Called after every part: what is known by then outlives the process."""

    def size(self, toy: Any, quick: Any, full: Any) -> Any:
        """Of the three the one to use."""
        return toy if self.toy else quick if self.quick else full

    def left(self) -> float:
        """Seconds until the section should end by itself."""
        return self.seconds - (time.perf_counter() - self.started)

    def check(self, what: str, value: float | torch.Tensor, limit: float) -> None:
        """A value that must not be above its limit; NaN is."""
        self.checks.append({"check": what, "value": float(value), "limit": limit, "passed": bool(value <= limit)})

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """A part of a correctness section: what it raises is a check that failed, and the parts after it still run."""
        if self.left() <= 0:
            self.notes.append(f"{what}: not reached in time")
            return
        try:
            work()
        except NotHere:
            raise
        except Exception as error:
            self.checks.append({"check": what, "value": None, "limit": None, "passed": False, "error": brief(error)})
        self.said(self)

    def measure(self, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A row of figures, if there is time for it; what it raises is said in the row."""
        if self.left() <= 0:
            self.notes.append(f"{what}: not reached in time")
            return None
        row = {"what": what}
        try:
            row |= work()
        except NotHere:
            raise
        except Exception as error:
            row["error"] = brief(error)
        self.rows.append(row)
        self.said(self)
        return row

    def outcome(self) -> dict[str, Any]:
        """As the JSON has it."""
        return {
            "seconds": round(time.perf_counter() - self.started, 1),
            "checks": self.checks,
            "rows": self.rows,
            "figures": self.figures,
            "settings": self.settings,
            "notes": self.notes,
        }

    # ==== time ====

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[], object], repeats: int = 5, warmup: int = 2) -> float:
        """Median seconds of a call, the device's queue empty before each; one repeat at toy size."""
        for _ in range(1 if self.toy else warmup):
            work()
        taken = []
        for _ in range(1 if self.toy else repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - start)
        return median(taken)

    def device_seconds_of(self, work: Callable[[], object], calls: int = 10, warmup: int = 2) -> float:
        """Seconds of a call on the device when many wait in its queue: what the host takes to launch them does not count."""
        for _ in range(1 if self.toy else warmup):
            work()
        calls = 1 if self.toy else calls
        if self.device.type != "cuda":
            return self.seconds_of(work, calls, 0)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        self.wait()
        return start.elapsed_time(end) / 1e3 / calls


def brief(error: BaseException) -> str:
    """What was raised, and where in rob, in one line."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}{at}"


def poison(device: torch.device, count: int) -> None:
    """Fill memory that the next allocations get with NaN: what a kernel does not write shows."""
    if device.type == "cuda":
        torch.full((count,), float("nan"), device=device)
