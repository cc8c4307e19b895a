"""A teacher that is not of the usual shape of its name, by ``--backbone-arg``."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.store.reader import TargetStore
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support.cli import FAST
from support.tiny import tiny_beton

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def data(tmp_path) -> Beton:
    return tiny_beton(tmp_path, 8)


def test_a_transformer_for_small_images_is_cached_and_verified(rob, data, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **SHAPE).state_dict(), weights)
    teacher = ["--teacher", "vit_tiny_patch16_224", "--checkpoint", weights]
    teacher += [word for name, value in SHAPE.items() for word in ("--backbone-arg", f"{name}={value}")]
    done = rob("cache-teacher", data.path, tmp_path / "t.zarr", *teacher, "--views", 1, *FAST)
    assert done.code == 0, done.err
    manifest = TargetStore.open(tmp_path / "t.zarr").manifest
    assert (manifest.dim, manifest.view_size) == (16, 32)
    assert manifest.weights_hash == load_teacher(TeacherConfig("vit_tiny_patch16_224", weights, SHAPE)).weights_hash
    assert rob("verify", tmp_path / "t.zarr", data.path, *teacher).code == 0
    other = rob("verify", tmp_path / "t.zarr", data.path, *teacher[:4])
    assert (other.code, "Traceback" in other.err) == (2, False)


@pytest.mark.parametrize("text", ["img_size", "img_size=", "=32", "img size=32"])
def test_what_is_no_name_and_value_is_refused(refused, data, tmp_path, text):
    words = ["cache-teacher", data.path, tmp_path / "t.zarr", "--teacher", "resnet10t", "--backbone-arg", text]
    refused(2, rf"--backbone-arg '{text}' is no NAME=VALUE: write it as img_size=32", *words)


@pytest.mark.parametrize("text", ["num_heads=5", "global_pool=foo", "patch_size=0"])
def test_a_value_that_the_network_cannot_have_is_a_sentence(refused, data, tmp_path, text):
    words = ["cache-teacher", data.path, tmp_path / "t.zarr", "--teacher", "vit_tiny_patch16_224"]
    refused(2, r"timm can't build vit_tiny_patch16_224: \w+Error", *words, "--backbone-arg", text)


def test_the_stand_in_comes_as_it_is(refused, data, tmp_path):
    words = ["cache-teacher", data.path, tmp_path / "t.zarr", "--teacher", "efficientnet_lite0"]
    refused(2, "--backbone-arg is for timm's networks, and efficientnet_lite0", *words, "--backbone-arg", "img_size=32")


def test_in_python_it_is_a_mapping_or_what_the_command_line_has():
    words = TeacherConfig("resnet10t", None, ("img_size=32", "act_layer=gelu", "dynamic_img_size=true"))
    assert words.backbone_args == {"img_size": 32, "act_layer": "gelu", "dynamic_img_size": True}
    assert TeacherConfig("resnet10t", None, words.backbone_args) == words
    with pytest.raises(MisuseError, match="`backbone_args` 'x' is no NAME=VALUE"):
        TeacherConfig("resnet10t", None, ("x",))
