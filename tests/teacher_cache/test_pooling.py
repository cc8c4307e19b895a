"""What a teacher pools when it is asked for other features than its paper's, and DINOv3's, which differ from timm's."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from rob.common.errors import MisuseError
from rob.common.store.manifest import StoreManifest
from rob.common.store.reader import TargetStore
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.teacher_cache import teachers
from rob.teacher_cache.backbones import build_backbone
from rob.teacher_cache.cache import cache_teacher
from rob.teacher_cache.registry import TEACHERS
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from rob.teacher_cache.verify import VerifyConfig, verify
from support import tiny
from support.published import SMALL_VIT

SMALL = {"embed_dim": 48, "depth": 2, "img_size": 32}
DINOV3 = "vit_small_patch16_dinov3"


@pytest.fixture(params=["dinov2_vits14", "dinov3_vits16"])
def ours(request, tmp_path) -> SimpleNamespace:
    """A tiny DINOv2 and DINOv3: its network, and its configuration."""
    name = request.param
    arguments = {**SMALL_VIT, "img_size": 28} if "v2" in name else SMALL
    torch.manual_seed(0)
    network = build_backbone(TEACHERS[name].backbone, {**TEACHERS[name].backbone_args, **arguments}).eval()
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    return SimpleNamespace(network=network, config=TeacherConfig(name, tmp_path / "vit.safetensors", arguments))


def test_class_token_and_mean_side_by_side(ours) -> None:
    teacher = load_teacher(replace(ours.config, teacher_features="cls+mean"))
    images = torch.randn(3, 3, ours.config.backbone_args["img_size"], ours.config.backbone_args["img_size"])
    with torch.no_grad():
        tokens = ours.network.forward_features(images)
    expected = torch.zeros(3, 96)
    first = 5 if "v3" in ours.config.name else 1  # four registers
    for n in range(3):
        for d in range(48):
            expected[n, d] = tokens[n, 0, d]
            expected[n, 48 + d] = sum(tokens[n, first:, d]) / len(tokens[n, first:])
    assert teacher.dim == 96
    torch.testing.assert_close(teacher(images), expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)


def test_the_hash_tells_poolings_apart(ours) -> None:
    found = [replace(ours.config, teacher_features=features) for features in (None, "cls", "mean", "cls+mean")]
    hashes = [load_teacher(config).weights_hash for config in found]
    assert len(set(hashes)) == (3 if "v3" in ours.config.name else 4)
    plain = teachers.hash_weights({f"backbone.{name}": t for name, t in ours.network.state_dict().items()})
    assert (hashes[0] == plain) == ("v2" in ours.config.name)  # what was usual stays what it was


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory) -> TeacherConfig:
    path = tmp_path_factory.mktemp("dinov3") / "dinov3.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(DINOV3, num_classes=0, **SMALL).state_dict(), path)
    return TeacherConfig("dinov3_vits16", path, SMALL)


def test_the_manifest_says_it_where_it_is_not_usual(data, headless, dinov3, tmp_path) -> None:
    config = replace(dinov3, teacher_features="cls+mean")
    store = tiny.tiny_store(tmp_path / "both.zarr", data, config, prototypes=4)
    assert (store.manifest.pooling, store.manifest.dim) == ("cls+mean", 96)
    assert store.manifest.to_json()["pooling"] == "cls+mean"
    assert verify(VerifyConfig(store.path, data.path, config, samples=4, device="cpu")).chunks
    usual = tiny.tiny_store(tmp_path / "usual.zarr", data, headless).manifest
    assert usual.pooling is None
    assert "pooling" not in usual.to_json()
    assert StoreManifest.from_json(tmp_path, usual.to_json()) == usual


def test_a_store_of_the_mean_is_not_gone_on_with(data, dinov3, tmp_path, monkeypatch) -> None:
    """As DINOv3's were made before its class token was taken."""
    config = tiny.tiny_cache_config(tmp_path / "old.zarr", data, dinov3)
    before = replace(TEACHERS["dinov3_vits16"], backbone_args={}, pooling=None)
    with monkeypatch.context() as earlier:
        earlier.setitem(TEACHERS, "dinov3_vits16", before)
        old = load_teacher(dinov3)
        cache_teacher(config)
    files = tiny.contents(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert F.cosine_similarity(old(images), load_teacher(dinov3)(images)).max() < 0.9
    with pytest.raises(MisuseError, match=r"old.zarr is already there .*\(pooling is None in the store, not 'cls'"):
        cache_teacher(config)
    with pytest.raises(
        MisuseError, match=r"was cached with what timm pools of teacher dinov3_vits16, this is the class token: give"
    ):
        verify(VerifyConfig(config.out, data.path, dinov3, device="cpu"))
    with pytest.raises(MisuseError, match=r"\(pooling is None in the store, not 'cls\+mean'"):
        cache_teacher(replace(config, teacher=replace(dinov3, teacher_features="cls+mean")))
    with pytest.raises(
        MisuseError, match=r"old\.zarr holds the mean of dinov3_vits16's patch tokens, .* cache the targets again"
    ):
        Cached(config.out).open(RunContext(data, torch.device("cpu")))
    assert tiny.contents(tmp_path) == files
    assert TargetStore.open(config.out).manifest.pooling is None


def test_timms_own_dinov3_gives_the_class_token_too(dinov3, data, tmp_path) -> None:
    images = torch.randn(2, 3, 32, 32)
    ours, timms = (load_teacher(replace(dinov3, name=name)) for name in ("dinov3_vits16", DINOV3))
    torch.testing.assert_close(timms(images), ours(images))
    assert (timms.pooling, timms.weights_hash) == ("cls", ours.weights_hash)
    store = tiny.tiny_store(tmp_path / "new.zarr", data, replace(dinov3, name=DINOV3))
    assert Cached(store.path).open(RunContext(data, torch.device("cpu"))).space.dim == ours.dim


def test_features_that_a_teacher_does_not_have(headless, with_head, tmp_path) -> None:
    with pytest.raises(
        MisuseError, match="`teacher_features` cls wants the class token of a ViT and test_efficientnet"
    ):
        load_teacher(replace(headless, teacher_features="cls"))
    with pytest.raises(MisuseError, match=r"`teacher_features` cls\+mean: the head of teacher test_efficientnet_gn"):
        load_teacher(replace(with_head, teacher_features="cls+mean"))
    with pytest.raises(MisuseError, match="unknown teacher features 'cls4'"):
        replace(headless, teacher_features="cls4")


def test_swavs_red_channel() -> None:
    odd = {name for name, entry in TEACHERS.items() if entry.std == (0.228, 0.224, 0.225)}
    assert odd == {"swav_resnet50", "swav_resnet50w2", "swav_resnet50w4", "deepclusterv2_resnet50"}
