"""Checkpoints and exported weights: whole or absent, refused where they do not fit, and never unpickled."""

import json
import pickle
import random
import resource
import signal
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from rob.common.errors import FailureError, MisuseError
from rob.common.weights import tensor_file
from rob.student_train.checkpoint import (
    export_weights,
    load_checkpoint,
    load_student,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from rob.student_train.students import StudentConfig, build_student, describe_student

CONFIG = {"student": "resnet18", "optimiser": {"name": "adamw", "lr": 1e-3}, "scales": (0.05, 0.25)}


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]


def test_state_comes_back_as_it_was(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    state = {"model": layer.state_dict(), "optimiser": optimiser.state_dict(), "epoch": 2, "random": random_state()}
    expected = draws()
    save_checkpoint(tmp_path / "checkpoint.pt", state, CONFIG)
    loaded = load_checkpoint(tmp_path / "checkpoint.pt", CONFIG)
    restore_random_state(loaded["random"])
    assert draws() == expected
    assert loaded["epoch"] == 2
    torch.testing.assert_close(loaded["model"], dict(state["model"]), rtol=0, atol=0)
    torch.testing.assert_close(loaded["optimiser"]["state"], state["optimiser"]["state"], rtol=0, atol=0)


def test_ctrl_c_waits_until_a_checkpoint_is_written(tmp_path):
    class Pressed:
        def __reduce__(self):  # torch is in the middle of the file
            signal.raise_signal(signal.SIGINT)
            return OrderedDict, ()

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 1, "pressed": Pressed()}, CONFIG)
    assert load_checkpoint(tmp_path / "checkpoint.pt", CONFIG)["epoch"] == 1


def test_another_configuration_is_refused_by_its_first_difference(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1}, CONFIG)
    with pytest.raises(MisuseError, match=r"optimiser\.lr = 0\.001, this run has optimiser\.lr = 0\.002"):
        load_checkpoint(path, {**CONFIG, "optimiser": {"name": "adamw", "lr": 2e-3}})
    with pytest.raises(MisuseError, match=r"ema = None, this run has ema = 0\.99"):
        load_checkpoint(path, {**CONFIG, "ema": 0.99})
    with pytest.raises(MisuseError, match=r"scales"):
        load_checkpoint(path, {name: value for name, value in CONFIG.items() if name != "scales"})


def test_an_option_that_came_later_is_none_in_an_earlier_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1}, CONFIG)
    assert load_checkpoint(path, {**CONFIG, "optimiser": {**CONFIG["optimiser"], "trust": None}})["epoch"] == 1


def test_missing_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(MisuseError, match="no such checkpoint"):
        load_checkpoint(path, CONFIG)
    save_checkpoint(path, {"weights": torch.randn(1000)}, CONFIG)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FailureError, match="truncated or no checkpoint"):
            load_checkpoint(path, CONFIG)
    torch.save({"model": {}}, path)
    with pytest.raises(FailureError, match="truncated or no checkpoint"):
        load_checkpoint(path, CONFIG)


class Malicious:
    def __reduce__(self):
        return (open, ("was_here", "w"))


def test_nothing_is_executed_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("checkpoint.pt", "wb") as file:
        pickle.dump(Malicious(), file)
    with pytest.raises(FailureError):
        load_checkpoint(tmp_path / "checkpoint.pt", CONFIG)
    torch.save({"format_version": 1, "config": {}, "state": Malicious()}, "checkpoint.pt")
    with pytest.raises(FailureError):
        load_checkpoint(tmp_path / "checkpoint.pt", CONFIG)
    assert not (tmp_path / "was_here").exists()


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1}, CONFIG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses the rest, as a full disk does
    try:
        with pytest.raises(FailureError, match=r"File too large; the earlier checkpoint\.pt is kept"):
            save_checkpoint(path, {"epoch": 2, "weights": torch.randn(1_000_000)}, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path, CONFIG)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("name", "small_images"), [("vit_tiny_patch16_224", True), ("mobilenetv2_050", True), ("mobilenetv2_050", False)]
)
def test_exported_weights_bring_their_student_back(tmp_path, name, small_images):
    config = StudentConfig(name, 32, small_images)
    backbone = build_student(config).eval()
    export_weights(backbone, describe_student(config), tmp_path / "student.safetensors")
    for source in (tmp_path, tmp_path / "student.safetensors"):
        loaded, info = load_student(source)
        assert info == describe_student(config)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(loaded(images), backbone(images))


def test_exported_weights_load_with_timm_alone(tmp_path):
    config = StudentConfig("vit_tiny_patch16_224", 32, small_images=True)
    export_weights(build_student(config), describe_student(config), tmp_path / "student.safetensors")
    info = describe_student(config)
    timm.create_model(info.name, **info.timm_kwargs).load_state_dict(load_file(tmp_path / "student.safetensors"))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "student.safetensors"
    with pytest.raises(MisuseError, match=r"no student\.safetensors in"):
        load_student(tmp_path)
    with pytest.raises(MisuseError, match="no such file"):
        load_student(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(MisuseError, match="truncated or no safetensors"):
        load_student(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(MisuseError, match=r"has no checksum.*give weights written by rob train-student"):
        load_student(path)
    path.write_bytes(tensor_file({"weight": torch.zeros(1)}, {}))
    with pytest.raises(MisuseError, match="does not say which student"):
        load_student(path)
    export_weights(torch.nn.Linear(2, 2), describe_student(StudentConfig("resnet18")), path)
    with pytest.raises(MisuseError, match="not those of the student 'resnet18'"):
        load_student(path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"timm_kwargs": {"num_classes": 0, "checkpoint_path": "weights.pth"}}, "no student has checkpoint_path"),
        ({"timm_kwargs": {"num_classes": 0, "pretrained": True}}, "no student has pretrained"),
        ({"timm_kwargs": {"num_classes": 1000}}, "a value is none that a student has"),
        ({"timm_kwargs": {"num_classes": 0, "img_size": 10**9}}, "a value is none"),
        ({"timm_kwargs": ["num_classes"]}, "no attribute"),
        ({"image_size": "224"}, "a value is none"),
        ({"mean": [0.5]}, "a value is none"),
        ({"hub": "somebody/something"}, "no student has hub"),
    ],
)
def test_nothing_that_a_weights_file_says_reaches_timm_unchecked(tmp_path, told, message):
    path, config = tmp_path / "student.safetensors", StudentConfig("test_resnet", 32, True)
    export_weights(build_student(config), describe_student(config), path)
    description = json.loads(json.dumps(describe_student(config).to_dict())) | told
    path.write_bytes(tensor_file(load_file(path), {"student": json.dumps(description)}))
    with pytest.raises(
        MisuseError, match=rf"student\.safetensors: its description of the student is .*{message}.*do not use"
    ):
        load_student(path)


def test_a_students_name_is_one_of_timms_own(tmp_path):
    """Names with a scheme would have timm load weights from elsewhere."""
    path, config = tmp_path / "student.safetensors", StudentConfig("test_resnet", 32, True)
    export_weights(build_student(config), describe_student(config), path)
    description = describe_student(config).to_dict() | {"name": f"local-dir:{tmp_path}"}
    path.write_bytes(tensor_file(load_file(path), {"student": json.dumps(description)}))
    with pytest.raises(MisuseError, match="unknown student 'local-dir:"):
        load_student(path)
