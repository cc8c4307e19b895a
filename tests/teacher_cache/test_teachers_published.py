"""Every teacher of the registry, from a file in its published layout to logits, against the official network.

Head counts, strides, paddings, epsilons and activations don't show in the shapes of tensors, so equal outputs are what
proves an entry right.
"""

import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from rob.cli import main
from rob.common.errors import MisuseError
from rob.common.screen import console
from rob.teacher_cache import backbones
from rob.teacher_cache.registry import STAND_IN, TEACHERS, teacher_table
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support import official
from support.official import Weights
from support.published import SMALL_RESNET, TINY, TRUE_WIDTHS, load, prefixed

DINOV3 = ("dinov3_vits16", "dinov3_vitb16", "dinov3_vitl16")


def test_every_entry_has_a_fixture() -> None:
    assert set(TEACHERS) - set(TINY) == set(DINOV3)  # tested by timm's converter


@pytest.mark.parametrize("name", TINY)
def test_features_and_logits_are_the_official_codes(name: str, tmp_path: Path) -> None:
    fixture = TINY[name]
    images, embedding, logits = fixture.build(tmp_path / "teacher.pth")
    teacher = load(name, fixture, tmp_path / "teacher.pth")
    torch.testing.assert_close(teacher(images), embedding, rtol=0, atol=1e-5)
    assert (embedding[0] - embedding[1]).abs().max() > 1e-3  # the images are told apart
    assert teacher.head_name == (TEACHERS[name].method if TEACHERS[name].head else "none")
    if logits is None:
        assert teacher.prototypes is None
        assert teacher.teacher_temp is None
    else:
        torch.testing.assert_close(teacher.logits(teacher(images)), logits, rtol=0, atol=1e-5)
        assert teacher.num_prototypes == 40
        assert teacher.teacher_temp == TEACHERS[name].teacher_temp


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE_WIDTHS)
def test_true_widths(name: str, tmp_path: Path) -> None:
    fixture = TRUE_WIDTHS[name]
    images, embedding, logits = fixture.build(tmp_path / "teacher.pth")
    teacher = load(name, fixture, tmp_path / "teacher.pth")
    assert teacher.num_prototypes == TEACHERS[name].num_prototypes
    torch.testing.assert_close(teacher(images), embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(teacher.logits(embedding), logits, rtol=0, atol=1e-5)


def test_wide_resnets_are_as_large_as_swavs_readme_says() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in backbones.WIDE_RESNETS[name]().parameters()) for name in ("resnet50w2", "resnet50w4")
        ]
    assert [round(size / 1e6) for size in sizes] == [94, 375]


@pytest.mark.parametrize("name", DINOV3)
def test_dinov3_goes_through_timms_converter(name: str, tmp_path: Path) -> None:
    arguments = {"embed_dim": 192, "depth": 2, "img_size": 32}  # rotated in fours, by 16 heads
    torch.manual_seed(0)
    model = timm.create_model(TEACHERS[name].backbone, num_classes=0, global_pool="token", **arguments).eval()
    for parameter in model.parameters():  # so that no norm or residual branch is idle
        torch.nn.init.normal_(parameter, std=0.2)
    published = {"rope_embed.periods": torch.ones(2), "mask_token": torch.zeros(1, 192)}
    for key, tensor in model.state_dict().items():
        for ours, theirs in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens")):
            key = key.replace(ours, theirs)
        published[key] = tensor
    for index in range(2):
        published[f"blocks.{index}.attn.qkv.bias"] = torch.zeros(576)
        published[f"blocks.{index}.attn.qkv.bias_mask"] = torch.zeros(576)
    torch.save(published, tmp_path / "dinov3.pth")
    images = torch.randn(2, 3, 32, 32)
    teacher = load_teacher(TeacherConfig(name, tmp_path / "dinov3.pth", arguments))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), F.normalize(model(images), dim=1))


def test_the_centre_comes_along_where_the_file_has_it(tmp_path: Path) -> None:
    fixture = TINY["ibot_vits16"]
    fixture.build(tmp_path / "ibot.pth")
    ibot = load("ibot_vits16", fixture, tmp_path / "ibot.pth")
    torch.testing.assert_close(ibot.centre, torch.arange(40.0) / 40)
    torch.testing.assert_close(ibot.patch_centre, -torch.arange(40.0) / 40)
    fixture = TINY["dino_vits16"]
    fixture.build(tmp_path / "released.pth")
    assert load("dino_vits16", fixture, tmp_path / "released.pth").centre is None
    content = torch.load(tmp_path / "released.pth", weights_only=False)
    torch.save(content | {"dino_loss": {"center": torch.ones(1, 40)}}, tmp_path / "trained_today.pth")
    assert load("dino_vits16", fixture, tmp_path / "trained_today.pth").centre.equal(torch.ones(40))


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("dino_vits16", "dino_deitsmall16_pretrain_full_checkpoint.pth"),
        ("ibot_vits16", "full ckpt"),
        ("swav_resnet50", "swav_800ep_pretrain.pth.tar"),
        ("msn_vits16", "vits16_800ep.pth.tar"),
        ("mocov2_resnet50", "moco_v2_800ep_pretrain.pth.tar"),
    ],
)
def test_a_backbone_alone_is_refused_and_the_right_file_named(name: str, needed: str, tmp_path: Path) -> None:
    fixture = TINY[name]
    backbone = Weights(1)
    fixture.backbone(backbone, torch.randn(1, 3, fixture.size, fixture.size))
    torch.save(dict(backbone), tmp_path / "pretrain.pth")
    with pytest.raises(MisuseError, match=f"has no projection head, only a backbone; {name} needs .*{needed}"):
        load(name, fixture, tmp_path / "pretrain.pth")


def test_a_classifier_is_not_taken_for_mocos_head(tmp_path: Path) -> None:
    backbone = Weights(1)
    official.resnet(backbone, torch.randn(1, 3, 64, 64), SMALL_RESNET["layers"], width=8)
    backbone.linear(torch.zeros(1, 256), "fc", 1000)
    torch.save(dict(backbone), tmp_path / "supervised.pth")
    with pytest.raises(MisuseError, match="has no projection head"):
        load("mocov2_resnet50", TINY["mocov2_resnet50"], tmp_path / "supervised.pth")


def test_prototypes_that_are_missing_are_named(tmp_path: Path) -> None:
    fixture = TINY["msn_vits16"]
    fixture.build(tmp_path / "msn.pth")
    content = torch.load(tmp_path / "msn.pth", weights_only=True)
    torch.save({"target_encoder": content["target_encoder"]}, tmp_path / "msn.pth")
    with pytest.raises(MisuseError, match="has no prototypes; msn_vits16 needs"):
        load("msn_vits16", fixture, tmp_path / "msn.pth")


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("dino_vits16", "dino_vits8"),
        ("dino_xcit_small_12_p16", "dino_xcit_medium_24_p16"),
        ("swav_resnet50", "swav_resnet50w2"),
        ("swav_resnet50", "msn_vits16"),
    ],
)
def test_another_architectures_file_is_refused(name: str, others: str, tmp_path: Path) -> None:
    TINY[others].build(tmp_path / "other.pth")
    with pytest.raises(MisuseError, match=rf"other.pth is not a {name}: .* (is|are) (missing|unknown|\()"):
        load(name, TINY[name], tmp_path / "other.pth")


def test_a_full_checkpoint_of_lightning_around_ddp(tmp_path: Path) -> None:
    fixture = TINY["dino_vits16"]
    images, _, logits = fixture.build(tmp_path / "teacher.pth")
    content = torch.load(tmp_path / "teacher.pth", weights_only=False)
    torch.save({"state_dict": prefixed("model.teacher.module.", content["teacher"])}, tmp_path / "wrapped.pth")
    teacher = load("dino_vits16", fixture, tmp_path / "wrapped.pth")
    torch.testing.assert_close(teacher.logits(teacher(images)), logits, rtol=0, atol=1e-5)


def test_a_published_teacher_without_its_file_says_what_to_fetch() -> None:
    with pytest.raises(MisuseError, match=r"dino_vits16 needs its file: pass `checkpoint` with https://.*Apache-2.0"):
        load_teacher(TeacherConfig("dino_vits16"))


def test_a_published_layout_under_a_timm_name_brings_its_head(tmp_path: Path) -> None:
    """So a teacher of one's own, trained with DINO's code on any timm model, needs no entry."""
    fixture = TINY["dino_vits16"]
    images, _, logits = fixture.build(tmp_path / "teacher.pth")
    teacher = load("vit_small_patch16_224", fixture, tmp_path / "teacher.pth")
    torch.testing.assert_close(teacher.logits(teacher(images)), logits, rtol=0, atol=1e-5)


def test_the_table_has_a_row_for_every_teacher() -> None:
    rows = {row["name"]: row for row in teacher_table()}
    assert set(rows) == {*TEACHERS, STAND_IN}
    assert rows["dinov2_vits14"]["head"] == "none published"
    assert rows["dino_vits16"]["prototypes"] == "65536"
    assert all(row["licence"] and row["file"] for row in rows.values())


@pytest.fixture
def rob_teachers(monkeypatch, capsys):
    """What ``rob teachers`` prints in a terminal of so many columns, line by line."""

    def run(*arguments: str, width: int = 80) -> list[str]:
        monkeypatch.setattr(console, "_width", width)
        monkeypatch.setattr(sys, "argv", ["rob", "teachers", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("width", [80, 100])
def test_the_list_says_what_each_file_has(rob_teachers, width) -> None:
    lines = rob_teachers(width=width)
    table = lines[: 1 + next(n for n, line in enumerate(lines) if line.startswith(STAND_IN))]
    assert table[0].split() == ["name", "backbone", "head", "K", "temp."]
    assert all(len(line) <= 80 for line in table)
    starts = [table[0].index(title) for title in ("name", "backbone", "head")]
    found: dict[str, tuple[str, ...]] = {}
    licence = ""
    for line in table[1:]:
        name, backbone, rest = (line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True))
        if backbone.startswith("licence: "):
            licence = backbone.removeprefix("licence: ")
        else:
            end = len("MLP, prototypes")
            found[name] = (backbone, rest[:end].strip(), *rest[end:].split(), licence)
    assert found["dino_vits16"] == ("vit_small_patch16_224", "MLP, prototypes", "65536", "0.07", "Apache-2.0")
    assert found["msn_vitl7"] == ("vit_large_patch16_224", "MLP, prototypes", "1024", "0.025", "CC-BY-NC-4.0")
    assert found["mocov2_resnet50"] == ("resnet50", "MLP", "none", "CC-BY-NC-4.0")
    assert found["mocov2_resnet101"] == ("resnet101", "MLP", "none", "none stated")
    assert found["dinov2_vitb14"] == ("vit_base_patch14_dinov2", "backbone only", "none", "Apache-2.0")
    assert found["dinov3_vits16"] == ("vit_small_patch16_dinov3", "backbone only", "none", "DINOv3 licence")
    assert found[STAND_IN] == ("tf_efficientnet_lite0", "backbone only", "none", "Apache-2.0")
    assert [row["name"] for row in teacher_table()] == list(found)
    for row in teacher_table():
        backbone, published, *_, licence = found[row["name"]]
        assert (backbone, licence) == (row["backbone"], row["licence"])
        assert ("MLP" in published) == (row["head"] != "none published")
        assert ("prototypes" in published) == (row["prototypes"] != "none")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (
            "dino_vits16",
            "encoder teacher.*, backbone backbone.*, head head.mlp.*, prototypes head.last_layer.*, centre dino_loss.center",
        ),
        ("mocov2_resnet50", "encoder encoder_q.* or encoder_k.*, backbone *, head fc.*"),
        ("dinov2_vits14", "a backbone without more"),
    ],
)
def test_one_teacher_with_its_file_and_layout(rob_teachers, name, layout) -> None:
    said = dict(line.strip().partition("  ")[::2] for line in rob_teachers(name))
    entry = TEACHERS[name]
    assert said["file"] == entry.file  # in one line, however long
    assert said["layout"] == layout
    assert said["head"] == (entry.head or "none published")
    assert said["licence"] == entry.licence
