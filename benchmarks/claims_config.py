"""What can be set of ``claims.py``, and one of its runs."""

from dataclasses import dataclass
from pathlib import Path

from rob.benchmarks.claims_rows import FLOAT16, GROUPS, Row
from rob.common.cores import usable_cores
from rob.teacher_cache.teachers import TeacherConfig


@dataclass(frozen=True)
class ClaimsConfig:
    """``teacher`` None: the store is there already. ``store`` None: in ``out``. ``prototypes`` are fitted where the teacher has
    none. ``workers`` are loader threads of a run; 0: the cores, divided by ``jobs``."""

    train: Path
    test: Path
    out: Path
    teacher: TeacherConfig | None = None
    store: Path | None = None
    students: tuple[str, ...] = ("cnn", "vit")
    """Names of ``STUDENTS`` or timm's, each with ``:bf16`` or nothing behind it."""
    rows: tuple[str, ...] = tuple(GROUPS)
    """Rows, and groups of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 6
    batch_size: int = 128
    views: int = 4
    num_local: int = 4
    recipe: str = "sslight"
    prototypes: int = 512
    teacher_size: int | None = None
    teacher_temp: float | None = None
    """Of objectives over prototypes whose row has none of its own; None: the store's."""
    linear_epochs: int = 100
    finetune_epochs: int = 10
    """Of the teacher, for supervised distillation."""
    jobs: int = 1
    workers: int = 0
    time_limit: float | None = None
    device: str = "auto"

    @property
    def threads(self) -> int:
        """Of one run."""
        return self.workers or max(1, usable_cores() // self.jobs)

    def store_of(self, row: Row) -> Path:
        """Where the row's targets are."""
        views, recipe = row.views or self.views, row.recipe or self.recipe
        if self.store is not None and (views, recipe, row.encoding) == (self.views, self.recipe, FLOAT16):
            return self.store
        kind = row.encoding
        what = f"top{kind.k}" if kind.kind == "topk" else kind.dtype
        return self.out / f"targets-{recipe}-{views}-{what}.zarr"

    @property
    def tuned_path(self) -> Path:
        return self.out / "teacher_tuned.safetensors"


@dataclass(frozen=True)
class Job:
    """One run: a student and a row under a seed."""

    student: str
    row: Row
    seed: int

    def __str__(self) -> str:
        return f"{self.student} {self.row.name} {self.seed}"

    def folder(self, out: Path) -> Path:
        return out / self.student.replace(":", "_") / self.row.name / str(self.seed)

    def result(self, out: Path) -> Path:
        return self.folder(out) / "result.json"
