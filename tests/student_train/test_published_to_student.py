"""From a published teacher's file to a trained student: what is stored is what the official network says to the views."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rob import cli
from rob.common.images.beton import Beton
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import Recipe
from rob.student_train.checkpoint import load_student
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import cache_teacher
from rob.teacher_cache.registry import TEACHERS
from rob.teacher_cache.teachers import Teacher, TeacherConfig
from support.published import TINY, TRUE_WIDTHS, load
from support.tiny import tiny_beton, tiny_cache_config

OBJECTIVES = {
    "dino_vits16": "dino",
    "ibot_swin_tiny_w7": "ibot",
    "deepclusterv2_resnet50": "swav",
    "msn_vits16": "msn",
    "mocov2_resnet50": "disco",
    "dinov2_vits14": "embedding",
}
"""One teacher of each kind of head and backbone, and what is made for it. ``test_teachers_published`` has every file, up to the
teacher's outputs; what follows knows no names."""
LOADER = LoaderConfig("torch", batch_size=4, workers=1)
IMAGES, VIEWS = 8, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    return tiny_beton(tmp_path_factory.mktemp("data"), IMAGES)


def views_seen(data: Beton, store: TargetStore, teacher: Teacher) -> Tensor:
    """The normalised pictures (N * V, 3, S, S) that the targets are targets of."""
    recipe, size = Recipe.from_dict(store.manifest.recipe), store.manifest.view_size
    loader = ViewLoader(data, recipe, store.manifest.seed, LOADER)
    mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    views = ViewSet(tuple(range(VIEWS)), size)
    batches = loader.epoch(np.arange(IMAGES), (views,))
    return torch.cat([b.augment(0, size / recipe.global_crops[0].size, mean, std).flatten(0, 1) for b in batches])


@pytest.mark.parametrize(("name", "objective"), OBJECTIVES.items())
def test_every_kind_of_teacher_trains_a_student(name: str, objective: str, data: Beton, tmp_path: Path) -> None:
    fixture = TINY[name]
    fixture.build(tmp_path / "teacher.pth")
    config = tiny_cache_config(
        tmp_path / "targets.zarr", data, TeacherConfig(name, tmp_path / "teacher.pth", fixture.arguments),
        encoding=Encoding("embedding", "float32"), view_size=fixture.size, loader=LOADER,
    )  # fmt: skip
    cache_teacher(config)
    store = TargetStore.open(config.out)
    _, _, embedding, logits = fixture.official(views_seen(data, store, load(name, fixture, tmp_path / "teacher.pth")))
    stored = torch.from_numpy(store.read(0, IMAGES)["embedding"]).flatten(0, 1)
    torch.testing.assert_close(stored, embedding, rtol=0, atol=1e-5)
    assert (store.prototypes is None) == (logits is None)
    if logits is not None:
        torch.testing.assert_close(stored @ torch.from_numpy(store.prototypes).T, logits, rtol=0, atol=1e-5)

    student = StudentConfig("test_resnet", image_size=32, small_images=False)
    training = TrainConfig(
        data.path, tmp_path / "run", student, Cached(config.out),
        objective=ObjectiveConfig(objective, hidden_dim=16),
        optimiser=OptimiserConfig(warmup_epochs=0), epochs=2, loader=LOADER, device="cpu",
    )  # fmt: skip
    trained = train_student(training)
    assert np.isfinite(trained.loss)
    assert load_student(trained.weights)[0](torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.slow
def test_the_two_commands_with_a_file_of_the_published_size(data: Beton, tmp_path: Path, monkeypatch) -> None:
    """Published temperatures, 65,536 prototypes and all: 0.3 GB."""
    name = "dino_vits16"

    def rob(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["rob", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code

    fixture, store = TRUE_WIDTHS[name], tmp_path / "targets.zarr"
    fixture.build(tmp_path / "teacher.pth")
    fast = ("--loader", "torch", "--workers", 1, "--device", "cpu", "--batch-size", 4)
    teacher = ("--teacher", name, "--checkpoint", tmp_path / "teacher.pth", "--encoding", "topk", "--topk", 1)
    rob("cache-teacher", data.path, store, *teacher, "--views", VIEWS, *fast)
    made = TargetStore.open(store)
    assert made.manifest.num_prototypes == TEACHERS[name].num_prototypes
    _, _, _, logits = fixture.official(views_seen(data, made, load(name, fixture, tmp_path / "teacher.pth")))
    best = decode(made.encoding, made.read(0, IMAGES))["logits"][..., 0].flatten()
    torch.testing.assert_close(best, logits.amax(1), rtol=1e-3, atol=1e-3)  # kept in half precision

    student = ("--student", "test_resnet", "--no-small-images", "--image-size", 32, "--hidden-dim", 16)
    rob("train-student", data.path, "--targets", store, "--objective", "dino", "--out", tmp_path / "run", *student,
        "--epochs", 1, *fast)  # fmt: skip
    assert (tmp_path / "run" / "student.safetensors").exists()
