"""A run's student as the teacher of another: the same embeddings and logits, from a file that says what is in it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rob.common.errors import MisuseError
from rob.common.heads import ProjectionHead, Prototypes
from rob.student_train.as_teacher import export_teacher
from rob.student_train.checkpoint import load_student, read_checkpoint, save_checkpoint
from rob.student_train.config import OptimiserConfig
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.student_config import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.momentum import Momentum
from rob.student_train.train import train_student
from rob.student_train.train_config import ExportTeacherConfig, TrainConfig
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint
from support.training import LOADER

NAME = "test_resnet"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_beton(tmp_path_factory.mktemp("data"), 24)


def trained(
    data, out: Path, objective: ObjectiveConfig, name: str = NAME, conv_stem: bool | None = None, **targets
) -> Path:
    train_student(
        TrainConfig(
            data.path, out, StudentConfig(name, 32, small_images=True, conv_stem=conv_stem), Momentum(**targets), objective,
            optimiser=OptimiserConfig(warmup_epochs=0), epochs=1, local_size=16, device="cpu", loader=LOADER,
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def swav(data, tmp_path_factory) -> Path:
    objective = ObjectiveConfig("swav", hidden_dim=24, sinkhorn="batch", teacher_temp=0.02)
    return trained(data, tmp_path_factory.mktemp("swav") / "run", objective, prototypes=10)


def test_swavs_student_with_its_head_and_prototypes(swav, tmp_path):
    path = export_teacher(ExportTeacherConfig(swav, tmp_path / "teacher.safetensors"))
    teacher = load_teacher(TeacherConfig(NAME, path))
    assert (teacher.num_prototypes, teacher.dim, teacher.teacher_temp) == (10, 128, 0.02)
    assert (teacher.head_name, teacher.view_size) == ("swav", 32)

    state = read_checkpoint(swav / "checkpoint.pt")["state"]["model"]
    backbone, info = load_student(swav)
    head = ProjectionHead(backbone.num_features, 24, 128, 2, "relu", norm=True).eval()
    head.load_state_dict({k.removeprefix("objective.head."): v for k, v in state.items() if "objective.head." in k})
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(teacher(images), head(backbone(images)).detach())
    assert teacher.prototypes is not None
    torch.testing.assert_close(teacher.prototypes.norm(dim=1), torch.ones(10))
    assert teacher.mean == info.mean


@pytest.mark.parametrize("name", ["swav", "msn"])
def test_frozen_prototypes_of_a_teacher_keep_their_lengths(data, tmp_path, name):
    """As DINO's with a learned gain, which are no unit rows."""
    teacher = tiny_teacher_checkpoint(tmp_path, prototypes=10)
    assert teacher.checkpoint is not None
    tensors = load_file(teacher.checkpoint)
    gain = next(tensor for key, tensor in tensors.items() if key.endswith("last_layer.weight_g"))
    gain.mul_(1.5)
    save_file(tensors, teacher.checkpoint)
    store = tiny_store(tmp_path / "t.zarr", data, teacher, loader=LOADER)
    objective = ObjectiveConfig(name, hidden_dim=24, sinkhorn="batch", head="frozen")
    config = TrainConfig(
        data.path, tmp_path / "run", StudentConfig(NAME, 32), Cached(store.path), objective,
        optimiser=OptimiserConfig(warmup_epochs=0), epochs=1, local_size=16, device="cpu", loader=LOADER,
    )  # fmt: skip
    train_student(config)
    path = export_teacher(ExportTeacherConfig(config.out, tmp_path / "teacher.safetensors"))
    rows = load_teacher(TeacherConfig(NAME, path)).prototypes
    assert rows is not None
    torch.testing.assert_close(rows.norm(dim=1), torch.full((10,), 1.5))


def test_a_teacher_that_is_there_is_kept(swav, tmp_path):
    config = ExportTeacherConfig(swav, tmp_path / "teacher.safetensors")
    config.out.write_text("of hours")
    with pytest.raises(MisuseError, match=r"teacher\.safetensors is there already: pass `overwrite`"):
        export_teacher(config)
    assert config.out.read_text() == "of hours"
    export_teacher(replace(config, overwrite=True))
    assert load_teacher(TeacherConfig(NAME, config.out)).num_prototypes == 10


def test_a_vit_that_begins_with_convolutions(data, tmp_path):
    objective = ObjectiveConfig("swav", hidden_dim=24, sinkhorn="batch")
    run = trained(data, tmp_path / "run", objective, "test_vit", conv_stem=True, prototypes=10)
    path = export_teacher(ExportTeacherConfig(run, tmp_path / "teacher.safetensors"))
    backbone, _ = load_student(run)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(load_teacher(TeacherConfig("test_vit", path)).backbone(images), backbone(images))


@pytest.mark.parametrize(("learned", "length"), [(None, 1.0), (False, 2.0)])
def test_swavs_prototypes_have_a_length_where_it_is_learned(swav, tmp_path, learned, length):
    payload = read_checkpoint(swav / "checkpoint.pt")
    payload["state"]["model"]["objective.prototypes.weight"] *= 2
    settings = payload["config"] | {"objective": payload["config"]["objective"] | {"norm_last_layer": learned}}
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", payload["state"], settings)
    path = export_teacher(ExportTeacherConfig(tmp_path / "run", tmp_path / "teacher.safetensors"))
    teacher = load_teacher(TeacherConfig(NAME, path))
    assert teacher.prototypes is not None
    torch.testing.assert_close(teacher.prototypes.norm(dim=1), torch.full((10,), length))


def test_the_copy_where_there_is_one(data, tmp_path):
    run = trained(data, tmp_path / "run", ObjectiveConfig("dino", hidden_dim=24), prototypes=12, copy_momentum=0.5)
    teacher = load_teacher(TeacherConfig(NAME, export_teacher(ExportTeacherConfig(run, tmp_path / "t.safetensors"))))
    state = read_checkpoint(run / "checkpoint.pt")["state"]
    prototypes = Prototypes(12, 256)
    prototypes.load_state_dict(
        {name: state["momentum"][f"objective.prototypes.{name}"] for name in ("weight_v", "weight_g")}
    )
    assert teacher.prototypes is not None
    assert teacher.centre is not None
    torch.testing.assert_close(teacher.prototypes, prototypes.matrix().detach())
    torch.testing.assert_close(teacher.centre, state["model"]["objective.centres.0.centre"])
    copy, _ = load_student(run / "student_average.safetensors")
    torch.testing.assert_close(teacher.backbone(torch.ones(1, 3, 32, 32)), copy(torch.ones(1, 3, 32, 32)).detach())


def test_half_of_the_bytes_and_another_size(swav, tmp_path):
    whole = export_teacher(ExportTeacherConfig(swav, tmp_path / "whole.safetensors"))
    half = export_teacher(ExportTeacherConfig(swav, tmp_path / "half.safetensors", image_size=48, half=True))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    teacher, other = (load_teacher(TeacherConfig(NAME, path)) for path in (whole, half))
    assert other.view_size == 48
    images = torch.randn(4, 3, 32, 32)
    assert (teacher(images) * other(images)).sum(1).min() > 0.999


def test_a_students_own_file_is_a_teacher_of_its_small_form(swav, tmp_path):
    """timm's network of that name has other strides in the stem, and takes the same tensors where it is ResNet-D's."""
    teacher = load_teacher(TeacherConfig(NAME, swav / "student.safetensors"))
    assert (teacher.num_prototypes, teacher.head_name) == (0, "none")
    images = torch.randn(2, 3, 32, 32)
    backbone, _ = load_student(swav)
    torch.testing.assert_close(teacher(images), torch.nn.functional.normalize(backbone(images)).detach())


def test_its_targets_need_no_fitted_prototypes(data, swav, tmp_path):
    path = export_teacher(ExportTeacherConfig(swav, tmp_path / "teacher.safetensors"))
    store = tiny_store(tmp_path / "targets.zarr", data, TeacherConfig(NAME, path))
    assert (store.manifest.head, store.manifest.num_prototypes, store.manifest.teacher_temp) == ("swav", 10, 0.02)
    assert store.prototypes is not None


def test_what_is_no_teacher_is_refused(data, swav, tmp_path):
    path = export_teacher(ExportTeacherConfig(swav, tmp_path / "teacher.safetensors"))
    with pytest.raises(MisuseError, match="holds a test_resnet, and `teacher` is resnet18: give `teacher` test_resnet"):
        load_teacher(TeacherConfig("resnet18", path))
    with pytest.raises(MisuseError, match="no such checkpoint"):
        export_teacher(ExportTeacherConfig(tmp_path / "nothing", tmp_path / "a.safetensors"))
    with pytest.raises(MisuseError, match=r"name it .*a\.safetensors"):
        ExportTeacherConfig(swav, tmp_path / "a.pth")
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    damaged = tmp_path / "damaged.safetensors"
    save_file(load_file(path), damaged, metadata | {"teacher": json.dumps({"activation": "exec"})})
    with pytest.raises(MisuseError, match="description of the head is damaged"):
        load_teacher(TeacherConfig(NAME, damaged))


def test_a_student_of_a_store_and_heads_that_no_teacher_has(data, swav, tmp_path):
    path = export_teacher(ExportTeacherConfig(swav, tmp_path / "teacher.safetensors"))
    store = tiny_store(tmp_path / "targets.zarr", data, TeacherConfig(NAME, path))
    config = TrainConfig(
        data.path, tmp_path / "run", StudentConfig(NAME, 32), Cached(store.path), ObjectiveConfig("dino", hidden_dim=8),
        optimiser=OptimiserConfig(warmup_epochs=0), epochs=1, local_size=16, device="cpu", loader=LOADER,
    )  # fmt: skip
    train_student(config)
    exported = export_teacher(ExportTeacherConfig(config.out, tmp_path / "of_store.safetensors"))
    assert load_teacher(TeacherConfig(NAME, exported)).teacher_temp == 0.02  # the store's: the run was given none

    payload = read_checkpoint(config.out / "checkpoint.pt")
    for objective, said in (
        ({"head_type": "mlp"}, "`head_type` mlp"),
        ({"name": "simreg"}, "`objective` simreg has layers"),
    ):
        settings = payload["config"] | {"objective": payload["config"]["objective"] | objective}
        save_checkpoint(tmp_path / "other" / "checkpoint.pt", payload["state"], settings)
        with pytest.raises(MisuseError, match=rf"{said}.*take student\.safetensors"):
            export_teacher(ExportTeacherConfig(tmp_path / "other", tmp_path / "b.safetensors"))
        assert not (tmp_path / "b.safetensors").exists()
