"""What can be set of the check of a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rob.common.config import Overwrite
from rob.common.settings import Setting, check

SECTIONS = {
    "ceilings": (3, False),
    "losses": (45, True),
    "views": (25, True),
    "stage1": (35, True),
    "stage2": (65, True),
    "ranks": (4, True),
    "waits": (12, False),
    "kernels": (1, False),
}
"""In the order in which they run: each one's share of the time, and whether it is one of correctness. What one leaves of its
time the next ones have. While the losses are measured, which need no code of numba, that of the others is compiled."""


@dataclass(frozen=True)
class GpuCheckConfig:
    """``seconds`` are for all sections together; ``quick`` is 90 of them with fewer sizes."""

    out: Annotated[Path, Setting("JSON to write, after every section.")] = Path("gpu_check.json")
    section: Annotated[str | None, Setting("One section alone: " + ", ".join(SECTIONS) + ".", choices=SECTIONS)] = None
    quick: Annotated[bool, Setting("Fewer sizes, in about 90 seconds.", option="--quick")] = False
    seconds: Annotated[
        float | None, Setting("Time for all sections; default 400, or 90 with --quick.", low=1, high=3600)
    ] = None
    dry_run: Annotated[
        bool, Setting("Every section's logic at toy size on the CPU; no settings are kept.", option="--dry-run")
    ] = False
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def scale(self) -> str:
        return "toy" if self.dry_run else "quick" if self.quick else "full"
