"""What tests of training share: small settings, and how to read what a run left."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rob.common.errors import MisuseError
from rob.common.records import sealed
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import Recipe
from rob.student_train.config import PairingConfig
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online, OnlineTargets
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

CPU = torch.device("cpu")
LOADER = LoaderConfig("torch", batch_size=8, workers=1)
STEPS_PER_EPOCH = 3
STUDENT = StudentConfig("test_resnet", 32)
NO_WARM_UP = OptimiserConfig(warmup_epochs=0)


def small_run(data: Path, store: TargetStore, out: Path, **changes: Any) -> TrainConfig:
    """Four epochs of three steps, one target view a step, a line a step."""
    usual = TrainConfig(
        data=data,
        out=out,
        student=STUDENT,
        targets=Cached(store.path),
        objective=ObjectiveConfig(hidden_dim=32, bottleneck=16),
        pairing=PairingConfig("same", step_targets=1),
        optimiser=NO_WARM_UP,
        epochs=4,
        device="cpu",
        loader=LOADER,
        log_every=1,
    )
    return replace(usual, **changes)


def log_line(**values: Any) -> bytes:
    """A line of a run's log."""
    usual = {"step": 1, "epoch": 0, "loss": 1.0, "gradient_norm": 1.0, "lr": 0.1, "images_per_second": 1.0}
    return sealed({**usual, "data_wait": 0.0, "shares": {"data": 0.0, "student": 1.0}, **values})


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple]:
    """All of the log but the times."""
    return [tuple(line[name] for name in ("step", "epoch", "loss", "gradient_norm", "lr")) for line in log_of(out)]


def online(teacher: TeacherConfig, store: TargetStore, recipe: Recipe | None = None) -> Online:
    """What makes on the spot what ``store`` holds, of the same seed."""
    manifest = store.manifest
    recipe = recipe or Recipe.from_dict(manifest.recipe)
    return Online(load_teacher(teacher), recipe, len(manifest.view_ids), manifest.view_size)


class OfOtherViews(Online):
    def open(self, run: RunContext) -> OnlineTargets:
        return super().open(replace(run, seed=run.seed + 1))


def refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        train_student(config)
    assert not config.out.exists()
