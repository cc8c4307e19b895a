"""How many cached views are enough? k-NN of students trained from 1, 2, 4 and 8 cached views, against the teacher run
in every step.

    python benchmarks/cached_views.py TRAIN.beton TEST.beton

The online teacher sees a new view of every image in every epoch: what a cache gives up. Same student, same steps, same seeds.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from rob.benchmarks.report import Report
from rob.benchmarks.standin import STUDENT, TEACHER
from rob.common.images.beton import Beton
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import RecipeOverrides, get_recipe
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached, CachedTargets
from rob.student_train.targets.config import TargetsConfig
from rob.student_train.targets.online import Online
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

UNLIMITED = 1 << 20
"""More views than any run asks for: the online teacher never sees one twice."""


@dataclass(frozen=True)
class FirstViews(Cached):
    """The first ``views`` of those in the store."""

    views: int = 1

    def open(self, run: RunContext) -> CachedTargets:
        branch = super().open(run)
        branch.views = self.views
        return branch


@dataclass(frozen=True)
class CachedViewsConfig:
    train: Path
    test: Path
    teacher: TeacherConfig = TEACHER
    teacher_size: int = 64
    student: StudentConfig = STUDENT
    views: tuple[int, ...] = (1, 2, 4, 8)
    epochs: int = 10
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 128
    device: str = "auto"


def run(config: CachedViewsConfig) -> Report:
    device, data = pick_device(config.device), Beton(config.train)
    recipe = get_recipe("moco-v2", RecipeOverrides(global_scale=(0.4, 1.0), colour=0.5))
    loader = LoaderConfig(batch_size=config.batch_size)
    teacher = load_teacher(config.teacher).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "targets.zarr"
        views = max(config.views)
        cache_teacher(
            CacheConfig(
                config.train, store, config.teacher, recipe, views,
                encoding=Encoding("embedding"), view_size=config.teacher_size, device=config.device,
                loader=LoaderConfig(batch_size=32),
            )
        )  # fmt: skip

        def targets(cached_views: int | None) -> TargetsConfig:
            if cached_views is None:
                return Online(teacher, recipe, UNLIMITED, config.teacher_size)
            return FirstViews(store, views=cached_views)

        rows = []
        for cached_views in (None, *config.views):
            top1, seconds = [], []
            for seed in config.seeds:
                training = TrainConfig(
                    data=config.train,
                    out=folder / f"{cached_views}-{seed}",
                    student=config.student,
                    targets=targets(cached_views),
                    objective=ObjectiveConfig("embedding"),
                    pairing=PairingConfig("same", step_targets=1),
                    optimiser=OptimiserConfig(lr=3e-3, warmup_epochs=1),
                    epochs=config.epochs,
                    seed=seed,
                    device=config.device,
                    loader=loader,
                    checkpoint_every=config.epochs,
                )
                start = time.perf_counter()
                weights = train_student(training).weights
                seconds.append(time.perf_counter() - start)
                network = FrozenNetwork.student(weights, device)
                top1.append(knn(network.features(config.train, loader), network.features(config.test, loader)).top1)
            rows.append(
                {
                    "targets": "online" if cached_views is None else f"{cached_views} cached",
                    "knn_top1": mean(top1),
                    "deviation": stdev(top1) if len(top1) > 1 else None,
                    "train_seconds": mean(seconds),
                }
            )
            print(rows[-1], flush=True)
    network = replace(FrozenNetwork.teacher(teacher, config.teacher_size, device), name="teacher")
    pixels = FrozenNetwork.pixels(config.student.image_size, device)
    for reference in (network, pixels):
        train, test = (reference.features(path, loader) for path in (config.train, config.test))
        rows.append({"targets": f"({reference.name})", "knn_top1": knn(train, test).top1})
    online = rows[0]
    ratios = {
        f"points_below_online_{r['targets'].split()[0]}_views": online["knn_top1"] - r["knn_top1"]
        for r in rows[1 : 1 + len(config.views)]
    }
    work = {
        "teacher": f"{config.teacher.name} at {config.teacher_size} px",
        "student": f"{config.student.name} at {config.student.image_size} px",
        "images": data.num_images,
        "epochs": config.epochs,
        "seeds": list(config.seeds),
    }
    return Report.of("cached_views", device, work, rows, ratios)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    report = run(CachedViewsConfig(given.train, given.test, epochs=given.epochs, seeds=tuple(range(given.seeds))))
    report.show()
    print(report.write())
