"""How many threads are worth starting in this process."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores that this process may use, at least 1: those that the system lets it run on, no more than the quota of its
    cgroup (a container's --cpus), shared with the ranks that torchrun started beside it on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, math.ceil(min(cores, cgroup_quota())) // ranks)


def cgroup_quota() -> float:
    """Cores' worth of time that the strictest cgroup around this process grants, infinite without one."""
    try:
        own = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
    except OSError:
        return math.inf
    least = math.inf
    for _, controllers, path in own:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUP / controllers if controllers else CGROUP  # version 1 has a tree for each of its controllers
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            least = min(least, _quota(folder))
            if folder == root:
                break
    return least


def _quota(folder: Path) -> float:
    try:
        if (file := folder / "cpu.max").exists():
            granted, period = file.read_text().split()
        else:
            granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(granted) / int(period) if int(granted) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # "max", or none there
        return math.inf
