"""Training: the cache changes nothing, and what a run leaves is what was asked for."""

import json
import sys
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig, geometry
from rob.common.views.recipes import get_recipe
from rob.student_train.checkpoint import load_student
from rob.student_train.config import PairingChoice
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support.tiny import tiny_store
from support.training import (
    LOADER,
    STUDENT,
    OfOtherViews,
    curve,
    log_of,
    online,
)

# ==== the cache changes nothing ====


@pytest.mark.parametrize(
    ("objective", "pairing"),
    [
        ("embedding", PairingConfig("same", step_targets=2)),
        ("dino", PairingConfig("cross", step_targets=2, fresh=False)),
        ("ibot", PairingConfig("all", step_targets=2)),
        ("msn", PairingConfig("cross", step_targets=1, num_local=2)),
    ],
)
def test_from_the_cache_the_curve_is_that_of_the_online_teacher(config, teacher, store, tmp_path, objective, pairing):
    config = replace(config, objective=replace(config.objective, name=objective), pairing=pairing, epochs=2)
    cached, on_the_spot = (
        replace(config, out=tmp_path / "cached"),
        replace(config, out=tmp_path / "online", targets=online(teacher, store)),
    )
    train_student(cached)
    train_student(on_the_spot)
    losses, expected = (torch.tensor(curve(run.out))[:, 2:] for run in (cached, on_the_spot))
    assert len(losses) == 6
    torch.testing.assert_close(losses[:3], expected[:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-6)  # rounding grows with the steps


def test_the_fast_loader_agrees_with_the_online_teacher_too(config, data, teacher, tmp_path):
    loader = LoaderConfig("auto", batch_size=8, workers=1)
    encoding = Encoding("embedding", "float32")
    fast = tiny_store(tmp_path / "targets.zarr", data, teacher, encoding=encoding, loader=loader)
    config = replace(config, loader=loader, epochs=1, pairing=PairingConfig("same", step_targets=2))
    train_student(replace(config, out=tmp_path / "cached", targets=Cached(fast.path)))
    train_student(replace(config, out=tmp_path / "online", targets=online(teacher, fast)))
    losses, expected = (torch.tensor(curve(tmp_path / name))[:, 2:] for name in ("cached", "online"))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_other_views_are_another_curve(config, teacher, store, tmp_path):
    """What the comparison above would show if the two branches' views were not the same."""
    config = replace(config, epochs=1)
    train_student(config)
    same = online(teacher, store)
    other_views = OfOtherViews(same.teacher, same.recipe, same.views, same.view_size)
    train_student(replace(config, out=tmp_path / "other", targets=other_views))
    losses, other = (torch.tensor(curve(out))[:, 2] for out in (config.out, tmp_path / "other"))
    assert (losses / other - 1).abs().max() > 1e-3


def test_pixels_of_two_loaders_are_a_note(config, data, teacher, tmp_path):
    fast = LoaderConfig("auto", batch_size=8, workers=1)
    if geometry(fast) == geometry(LOADER):
        pytest.skip("ffcv is not installed here: there is one loader")
    other = tiny_store(tmp_path / "targets.zarr", data, teacher, loader=fast)
    notes: list[str] = []
    train_student(replace(config, targets=Cached(other.path), epochs=1), progress=TrainProgress(note=notes.append))
    assert len(notes) == 1
    assert "use the same `loader`" in notes[0]


def test_the_teachers_batch_norm_stays_as_it_is_whatever_the_students_mode(config, data, tmp_path):
    """DisCo's published code calls train() on a module that holds the teacher too."""
    weights = tmp_path / "teacher.safetensors"
    model = timm.create_model("test_resnet", num_classes=0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after a training: batch statistics would be far from these
            module.running_mean += 0.3
    save_file(model.state_dict(), weights)
    frozen = load_teacher(TeacherConfig("test_resnet", weights))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    live = Online(frozen, get_recipe("moco-v2"), views=2, view_size=32)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    said = frozen(images)

    class Both(torch.nn.Module):
        """What a module is that holds student and teacher."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher = frozen

    Both().train()
    disco = replace(config.objective, name="disco", queue=20)
    train_student(replace(config, targets=live, objective=disco, pairing=PairingConfig("same"), epochs=1))
    assert not any(module.training for module in frozen.modules())
    torch.testing.assert_close(dict(frozen.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(frozen(images), said, rtol=0, atol=0)
    alone = torch.cat(
        [frozen(image[None]) for image in images]
    )  # of batch statistics each image would say another thing
    torch.testing.assert_close(alone, said, rtol=1e-4, atol=1e-5)


# ==== what comes out ====


def test_the_run_folder_holds_what_the_design_says(config, data):
    result = train_student(replace(config, epochs=2, average=0.9))
    out = config.out
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "train.log", "checkpoint.pt", "student.safetensors", ".lock"),
        "student_average.safetensors",
    }
    assert result.weights == out / "student.safetensors"
    assert result.steps == 6
    assert result.loss == log_of(out)[-1]["loss"]

    timm.create_model(STUDENT.name, num_classes=0).load_state_dict(load_file(out / "student.safetensors"))
    backbone, info = load_student(out)
    assert (info.name, info.image_size) == (STUDENT.name, 32)
    assert not backbone.training
    average, _ = load_student(out / "student_average.safetensors")
    assert not torch.equal(average.conv1[0].weight, backbone.conv1[0].weight)

    settings = json.loads((out / "config.json").read_text())
    assert settings["student"]["name"] == STUDENT.name
    assert settings["recipe"]["name"] == "dino"
    assert settings["data_fingerprint"] == data.manifest.fingerprint
    assert settings["branch"]["teacher"] == "test_efficientnet_gn"
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log_of(out)] == [0, 0, 0, 1, 1, 1]
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in log_of(out))
    assert (out / "train.log").read_text().count("\n") == 6


def test_the_student_learns_what_the_teacher_says(config):
    train_student(replace(config, epochs=12, optimiser=OptimiserConfig(lr=0.05, warmup_epochs=1)))
    losses = [line["loss"] for line in log_of(config.out)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_defaults_are_those_of_the_command(config, store, tmp_path, monkeypatch):
    """The README's snippet, and the same in words: one configuration, down to the pairing that the objective asks for."""
    from rob import cli
    from rob.student_train import train

    given: list[TrainConfig] = []

    def note_down(config, progress):
        given.append(config)
        raise SystemExit

    monkeypatch.setattr(train, "train_student", note_down)
    for objective, planned in (("embedding", ()), ("disco", ("--epochs", 2, "--batch-size", 8))):
        out = tmp_path / objective
        words = [config.data, "--targets", store.path, "--out", out, "--student", "resnet18", "--objective", objective]
        monkeypatch.setattr(sys, "argv", ["rob", "train-student", *map(str, words), *map(str, planned)])
        with pytest.raises(SystemExit):
            cli.main()
        said = TrainConfig(config.data, out, StudentConfig("resnet18"), Cached(store.path), ObjectiveConfig(objective))
        length = {"epochs": 2, "loader": LoaderConfig("auto", 8)} if planned else {}
        assert given[-1] == replace(said, pairing=PairingChoice(), **length)
