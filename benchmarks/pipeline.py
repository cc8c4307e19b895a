"""Training from the cache against running the teacher in every step: same student, same views, same steps, in one run.

    rob bench pipeline

Three sides take turns, round by round, so that the machine's noise falls on all alike: ``cached``, ``online``, and
``student only`` (the student on batches already in memory: the limit that no loader can pass). The sides' losses must agree
before the times count. Cached and in memory again with targets of patches, 7 x 7 a view beside its embedding.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from rob.benchmarks.report import Report, parts
from rob.benchmarks.standin import STUDENT, TEACHER
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.store.patches import PatchChoice
from rob.common.store.reader import TargetStore
from rob.common.timing import Stopwatch
from rob.common.views.loader import LoaderConfig, ViewLoader, resolve_loader
from rob.common.views.recipes import get_recipe
from rob.student_train.crops import Preparation, crop_sets, views_like
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig, describe_student
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online
from rob.student_train.targets.pairing import PairingConfig, ViewPlan, plan_views
from rob.student_train.train import epoch_order, timed
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

LEAD = 5
"""Steps before those whose time counts, and batches behind them: a loader makes a few ahead, and is to be as busy as in the
middle of an epoch, with neither batches in store nor an end in sight."""


@dataclass(frozen=True)
class PipelineConfig:
    """``data`` None packs Fashion-MNIST; ``rounds`` of ``steps`` steps a side, the first warms up. Patches are of views of
    ``patch_size``, larger than ``teacher_size``: a teacher's map has few positions there.
    """

    data: Path | None = None
    teacher: TeacherConfig = TEACHER
    teacher_size: int = 96
    patch_size: int = 224
    student: StudentConfig = STUDENT
    recipe: str = "weak"
    views: int = 2
    images: int = 1024
    batch_size: int = 64
    rounds: int = 6
    steps: int = 6
    precision: str = "fp32"
    device: str = "auto"


def run(config: PipelineConfig) -> Report:
    """Raises AssertionError when the sides' losses differ: then they did not do the same work."""
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        return _run(config, device, Path(folder))


def _run(config: PipelineConfig, device: torch.device, folder: Path) -> Report:
    path = config.data or folder / "data.beton"
    if config.data is None:
        pack(PackConfig("fashion-mnist", path, raw=True, limit=config.images))
    data, recipe = Beton(path), get_recipe(config.recipe)
    loader = LoaderConfig(batch_size=config.batch_size)

    clock = Stopwatch(device)

    def start_clock(done: int, total: int) -> None:
        if done == 0:  # the teacher is loaded and tried: from here to the finished store
            clock.take()

    cache = CacheConfig(
        path, folder / "targets.zarr", config.teacher, recipe, config.views, encoding=Encoding("embedding", "float32")
    )
    cache = replace(
        cache, view_size=config.teacher_size, precision=config.precision, device=config.device, loader=loader
    )
    cache_teacher(cache, CacheProgress(rows=start_clock))
    _, caching = clock.take()
    dense = replace(cache, out=folder / "patches.zarr", view_size=config.patch_size, patches=PatchChoice("grid"))
    cache_teacher(dense)

    training = TrainConfig(
        data=path,
        out=folder,
        student=config.student,
        targets=Cached(cache.out),
        objective=ObjectiveConfig("embedding"),
        pairing=PairingConfig("same", step_targets=1),
        optimiser=OptimiserConfig(warmup_epochs=0),
        epochs=10_000,
        precision=config.precision,
        device=config.device,
        loader=loader,
    )
    teacher = load_teacher(config.teacher).to(device)
    online = replace(training, targets=Online(teacher, recipe, config.views, config.teacher_size))
    patches = replace(training, targets=Cached(dense.out), objective=ObjectiveConfig("patch"))
    sides = {
        "cached": Side(training, data, device, config.steps),
        "online": Side(online, data, device, config.steps),
        "student only": Side(training, data, device, config.steps, in_memory=True),
        "cached, patches": Side(patches, data, device, config.steps),
        "student only, patches": Side(patches, data, device, config.steps, in_memory=True),
    }
    for _ in parts(range(config.rounds)):
        for side in sides.values():
            side.round()
    losses = {name: side.losses for name, side in sides.items()}
    tolerance = tolerance_of(device, config.precision)
    for one, other in (("cached", "online"), ("cached", "student only"), ("cached, patches", "student only, patches")):
        same = np.allclose(losses[one][:LEAD], losses[other][:LEAD], rtol=tolerance)
        assert same, f"the sides differ: {losses}"

    rows = [{"side": name, **side.row()} for name, side in sides.items()]
    speed = {row["side"]: row["images_per_second"] for row in rows}
    of_patches = next(row for row in rows if row["side"] == "cached, patches")
    cache_seconds_per_image = caching / data.num_images
    saved_per_image = 1 / speed["online"] - 1 / speed["cached"]
    ratios = {
        "cached_vs_online": speed["cached"] / speed["online"],
        "cached_vs_student_only": speed["cached"] / speed["student only"],
        "break_even_epochs": cache_seconds_per_image / saved_per_image if saved_per_image > 0 else None,
        "patches_cached_vs_student_only": speed["cached, patches"] / speed["student only, patches"],
        "patches_waiting": of_patches["waiting_for_data"] + of_patches["reading_targets"],
    }
    encoding = TargetStore.open(dense.out).patches
    assert encoding is not None
    work = {
        "teacher": f"{config.teacher.name} at {config.teacher_size} px",
        "student": f"{config.student.name} at {config.student.image_size} px",
        "images": data.num_images,
        "batch_size": config.batch_size,
        "steps": config.steps * (config.rounds - 1),
        "views_cached": config.views,
        "precision": config.precision,
        "caching_images_per_second": data.num_images / caching,
        "patches": f"{encoding.grid} x {encoding.grid} x {encoding.dim} at {config.patch_size} px, "
        f"{encoding.bytes_per_view:,} bytes a view",
    }
    return Report.of("pipeline", device, work, rows, ratios)


def tolerance_of(device: torch.device, precision: str) -> float:
    """How far two sides' losses may be apart, relative to their size: only float32 on a CPU keeps more than some ten bits of a
    product."""
    return 1e-3 if device.type == "cpu" and precision == "fp32" else 2e-2


class Side:
    """One way to train, advanced a few steps at a time."""

    def __init__(
        self,
        config: TrainConfig,
        data: Beton,
        device: torch.device,
        steps: int,
        in_memory: bool = False,
    ):
        steps_per_epoch = data.num_images // config.loader.batch_size
        branch = config.targets.open(
            RunContext(data, device, config.precision, config.seed, config.objective, config.student)
        )
        self.trainer = Trainer(config, branch.space, steps_per_epoch, device)
        assert config.epochs is not None, "a benchmark says how long"
        branch.follow(self.trainer.model, steps_per_epoch, config.epochs)
        info = describe_student(config.student)
        self.config, self.data, self.branch, self.steps, self.in_memory = config, data, branch, steps, in_memory
        self.prepare = Preparation(branch.recipe, info.mean, info.std, device)
        loading = resolve_loader(config.loader, device, views_like(config, branch))
        self.loader = ViewLoader(data, branch.recipe, branch.seed, loading)
        self.stopwatch = Stopwatch(device, synchronise=True)
        self.step, self.losses = 0, []
        self.rounds: list[tuple[dict[str, float], float]] = []
        self.kept: list[tuple] = []

    def round(self) -> None:
        """``steps`` steps whose time counts, behind ``LEAD`` steps and ahead of as many batches of the same epoch."""
        size, count = self.config.loader.batch_size, LEAD + self.steps
        assert isinstance(self.config.pairing, PairingConfig)
        plan = plan_views(self.config.pairing, self.branch.views, epoch=0)
        pair_weights = plan.pair_weights.to(self.trainer.device)
        order = epoch_order(self.config, self.data.num_images, self.branch.window_blocks, epoch=0)
        order = order[: size * (count + LEAD)]
        assert len(order) == size * (count + LEAD), "too few images for a round"
        seen = self._kept(order[: size * count], plan) if self.in_memory else self._loaded(order, plan)
        for number, (images, target) in enumerate(islice(seen, count), 1):
            self._train(images, target, pair_weights)
            if number == LEAD:
                self.stopwatch.take()
        self.rounds.append(self.stopwatch.take())

    def _kept(self, order: np.ndarray, plan: ViewPlan) -> list[tuple]:
        """Views and targets of each batch, in memory."""
        if not self.kept:
            crops = crop_sets(self.config, self.branch.recipe, plan)
            with self.branch.targets(order, self.config.loader.batch_size, plan) as target_of:
                for batch in self.loader.epoch(order, crops):
                    batch = batch.to(self.trainer.device)
                    self.kept.append((self.prepare(batch, crops), target_of(batch)))
        return self.kept

    def _loaded(self, order: np.ndarray, plan: ViewPlan) -> Iterator[tuple]:
        """The same, as training has them."""
        crops = crop_sets(self.config, self.branch.recipe, plan)
        sets = crops + self.branch.view_sets(plan)
        with self.branch.targets(order, self.config.loader.batch_size, plan) as target_of:
            for batch in timed(self.loader.epoch(order, sets), self.stopwatch):
                with self.stopwatch("prepare"):
                    batch = batch.to(self.trainer.device)  # as training does it: beside the computation
                    images = self.prepare(batch, crops)
                with self.stopwatch("target"):
                    self.branch.before_step(self.step)
                    target = target_of(batch, images)
                yield images, target

    def _train(self, images, target, pair_weights) -> None:
        with self.stopwatch("student"):
            health, _ = self.trainer.step(self.step, images, target, pair_weights)
            self.branch.after_step(self.step)
        self.losses.append(float(health[0]))
        self.step += 1

    def row(self) -> dict[str, Any]:
        """Medians over the rounds but the first."""
        counted = self.rounds[1:]
        images = self.steps * self.config.loader.batch_size
        shares = {
            name: median(s.get(name, 0.0) / passed for s, passed in counted)
            for name in ("data", "prepare", "target", "student")
        }
        is_online = self.branch.kind == "online"
        return {
            "images_per_second": median(images / passed for _, passed in counted),
            "waiting_for_data": shares["data"],
            "augment": shares["prepare"],
            "teacher": shares["target"] if is_online else 0.0,
            "reading_targets": 0.0 if is_online else shares["target"],
            "student_and_loss": shares["student"],
        }


if __name__ == "__main__":
    report = run(PipelineConfig())
    report.show()
    print(report.write())
