"""What this process may have of the machine: how many threads are worth starting, and how much memory there is for it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The cores that this process may use, at least 1: those that the system lets it run on, no more than the quota of its
    cgroup (a container's --cpus), shared with the ranks that torchrun started beside it on this machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_quota())) // _ranks_here())


def cgroup_quota() -> float:
    """Cores' worth of time that the strictest cgroup around this process grants, infinite without one."""
    return min(map(_quota, _own_cgroups("cpu")), default=math.inf)


def usable_memory() -> int:
    """The bytes that this process may take: of the machine's memory, no more than the strictest cgroup around it grants (a
    container's --memory, a job's of Slurm), shared with the ranks that torchrun started beside it on this machine.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min([machine, *map(_memory_limit, _own_cgroups("memory"))])) // _ranks_here()


def _ranks_here() -> int:
    """That torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _own_cgroups(controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, from its own outwards; none where there are no cgroups."""
    try:
        own = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in own:
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controllers if controllers else CGROUP  # version 1 has a tree for each of its controllers
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            yield folder
            if folder == root:
                break


def _memory_limit(folder: Path) -> float:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # none there, or "max"
            continue
    return math.inf


def _quota(folder: Path) -> float:
    try:
        if (file := folder / "cpu.max").exists():
            granted, period = file.read_text().split()
        else:
            granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(granted) / int(period) if int(granted) > 0 and int(period) > 0 else math.inf
    except (OSError, ValueError):  # "max", or none there
        return math.inf
