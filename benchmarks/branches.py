"""The three fillings of the target branch: cached, the teacher online, and a momentum copy without any teacher.

    rob bench branches

Same student, same multi-crop views, same steps of DINO, in one run; the sides take turns as in ``rob bench pipeline``. The
teacher has no head, so the online one gets the prototypes that were fitted for the store: those two sides' losses must agree
before the times count. The momentum copy has as many of its own.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rob.benchmarks.pipeline import LEAD, Side, tolerance_of
from rob.benchmarks.report import Report, parts
from rob.benchmarks.standin import STUDENT, TEACHER
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.config import TargetsConfig
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.online import Online
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

TEMPERATURE = 0.04
"""Of all sides' targets; it changes no time."""


@dataclass(frozen=True)
class BranchesConfig:
    """``data`` None packs ``images`` of Fashion-MNIST; ``rounds`` of ``steps`` steps a side, the first round warms up."""

    data: Path | None = None
    teacher: TeacherConfig = TEACHER
    teacher_size: int = 96
    student: StudentConfig = STUDENT
    recipe: str = "dino"
    num_local: int = 6
    prototypes: int = 512
    images: int = 1024
    batch_size: int = 64
    rounds: int = 6
    steps: int = 6
    precision: str = "fp32"
    device: str = "auto"


def run(config: BranchesConfig) -> Report:
    """Raises AssertionError when the losses of cached and online differ: then they did not do the same work."""
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        return _run(config, device, Path(folder))


def _run(config: BranchesConfig, device: torch.device, folder: Path) -> Report:
    path = config.data or folder / "data.beton"
    if config.data is None:
        pack(PackConfig("fashion-mnist", path, raw=True, limit=config.images))
    data, recipe, loader = Beton(path), get_recipe(config.recipe), LoaderConfig(batch_size=config.batch_size)
    cache = CacheConfig(
        path, folder / "targets.zarr", config.teacher, recipe, views=2, encoding=Encoding("embedding", "float32"),
        view_size=config.teacher_size, prototypes=config.prototypes, precision=config.precision, device=config.device,
        loader=loader,
    )  # fmt: skip
    cache_teacher(cache)

    objective = ObjectiveConfig("dino", teacher_temp=TEMPERATURE, centre_targets="running", head="fresh")
    training = TrainConfig(
        data=path,
        out=folder,
        student=config.student,
        targets=Cached(cache.out),
        objective=objective,
        pairing=PairingConfig("cross", step_targets=2, num_local=config.num_local, fresh=False),
        optimiser=OptimiserConfig(warmup_epochs=0),
        epochs=10_000,
        precision=config.precision,
        device=config.device,
        loader=loader,
    )
    teacher = load_teacher(config.teacher).to(device)
    fitted = TargetStore.open(cache.out).prototypes
    assert fitted is not None
    teacher.prototypes = torch.from_numpy(fitted).to(device)
    fillings: dict[str, TargetsConfig] = {
        "cached": training.targets,
        "online": Online(teacher, recipe, 2, config.teacher_size),
        "momentum": Momentum(recipe, config.prototypes, warmup_teacher_temp_epochs=0),
    }
    sides = {
        name: Side(replace(training, targets=filling), data, device, config.steps) for name, filling in fillings.items()
    }
    for _ in parts(range(config.rounds)):
        for side in sides.values():
            side.round()
    first, same = (sides[name].losses[:LEAD] for name in ("cached", "online"))
    assert np.allclose(first, same, rtol=tolerance_of(device, config.precision)), (
        f"the sides differ: {first} and {same}"
    )

    rows = []
    for name, side in sides.items():
        row = side.row()
        rows.append(
            {
                "targets": name,
                "images_per_second": row["images_per_second"],
                "waiting_for_data": row["waiting_for_data"],
                "augment": row["augment"],
                "making_targets": row["teacher"] + row["reading_targets"],
                "student_and_loss": row["student_and_loss"],
            }
        )
    speed = {row["targets"]: row["images_per_second"] for row in rows}
    ratios = {
        "cached_vs_momentum": speed["cached"] / speed["momentum"],
        "cached_vs_online": speed["cached"] / speed["online"],
        "momentum_vs_online": speed["momentum"] / speed["online"],
    }
    work = {
        "teacher": f"{config.teacher.name} at {config.teacher_size} px, {config.prototypes} fitted prototypes",
        "student": f"{config.student.name} at {config.student.image_size} px",
        "objective": objective.name,
        "views": f"2 global, {config.num_local} local, recipe {config.recipe}",
        "images": data.num_images,
        "batch_size": config.batch_size,
        "steps": config.steps * (config.rounds - 1),
        "precision": config.precision,
    }
    return Report.of("branches", device, work, rows, ratios)


if __name__ == "__main__":
    report = run(BranchesConfig())
    report.show()
    print(report.write())
