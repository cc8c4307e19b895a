"""Students by name: shapes at every crop size, the small-image forms, and the description that rebuilds them."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from rob.common.errors import MisuseError
from rob.student_train.checkpoint import export_weights, load_student
from rob.student_train.export.timm_folder import is_for_timm
from rob.student_train.objectives import OBJECTIVES
from rob.student_train.students import (
    StudentConfig,
    StudentInfo,
    adapt_stem,
    build_student,
    check_input_size,
    create_student,
    describe_student,
    num_macs,
    num_parameters,
    with_usual_patch_drop,
)

STUDENTS = [
    "vit_tiny_patch16_224",
    "resnet18",
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "mixnet_m",
]


def test_a_vit_takes_global_and_local_crops():
    backbone = build_student(StudentConfig("vit_tiny_patch16_224", 224)).eval()
    for size in (224, 96):
        with torch.no_grad():
            assert backbone(torch.randn(2, 3, size, size)).shape == (2, backbone.num_features)


@pytest.mark.parametrize("name", STUDENTS)
def test_small_form_takes_both_crops_and_keeps_a_map_of_positions_at_32_px(name):
    backbone = build_student(StudentConfig(name, 32, small_images=True)).eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, backbone.num_features)
        features = backbone.forward_features(torch.randn(1, 3, 32, 32))
    positions = features.shape[1] - 1 if features.ndim == 3 else features.shape[2] * features.shape[3]
    assert positions >= 16


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "mobilenetv2_050", "mobilenetv3_small_100", "mixnet_m"])
@pytest.mark.parametrize("side", [32, 64])
def test_the_small_form_of_a_cnn_ends_with_four_positions_a_side(name, side):
    backbone = build_student(StudentConfig(name, side, small_images=True)).eval()
    with torch.no_grad():
        assert backbone.forward_features(torch.randn(1, 3, side, side)).shape[-2:] == (4, 4)


def test_a_small_cnn_from_before_there_were_two_forms_is_rebuilt_as_it_was():
    told = describe_student(StudentConfig("mobilenetv3_small_100", 64, small_images=True)).to_dict()
    assert told.pop("output_stride") == 16
    backbone = create_student(StudentInfo.from_dict(told)).eval()
    with torch.no_grad():
        assert backbone.forward_features(torch.randn(1, 3, 64, 64)).shape[-2:] == (8, 8)


@pytest.mark.parametrize("wrong", [4, "16", {"small_images": False}])
def test_a_made_up_output_stride_is_refused(wrong):
    told = describe_student(StudentConfig("resnet18", 64, small_images=True)).to_dict()
    with pytest.raises(ValueError, match="none that a student has"):
        StudentInfo.from_dict(told | (wrong if isinstance(wrong, dict) else {"output_stride": wrong}))


@pytest.mark.parametrize(
    ("name", "side", "small_images"),
    [
        ("vit_tiny_patch16_224", 32, True),
        ("resnet18", 32, True),
        ("resnet18", 64, True),
        ("mobilenetv2_050", 64, True),
        ("mobilenetv3_small_100", 32, False),
    ],
)
def test_timm_alone_rebuilds_it_from_the_description(name, side, small_images):
    """The documented lines: timm's name and arguments, and ``adapt_stem`` for the CNNs' small form."""
    config = StudentConfig(name, side, small_images)
    backbone = build_student(config).eval()
    info = StudentInfo.from_dict(describe_student(config).to_dict())
    rebuilt = timm.create_model(info.name, **info.timm_kwargs)
    if small_images and not name.startswith("vit"):
        adapt_stem(rebuilt, info.output_stride)
    rebuilt.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(images), backbone(images), rtol=1e-4, atol=1e-5)


CONVOLUTIONS = StudentConfig("test_vit", 64, small_images=True, conv_stem=True)


@pytest.mark.parametrize("side", [32, 64])
def test_a_vit_with_convolutions_has_as_many_positions(side, tmp_path):
    config = replace(CONVOLUTIONS, image_size=side)
    backbone = build_student(config).eval()
    with torch.no_grad():
        assert backbone.forward_features(torch.randn(1, 3, side, side)).shape[1] == 8 * 8 + 1
        assert backbone.forward_features(torch.randn(1, 3, side // 2, side // 2)).shape[1] == 4 * 4 + 1  # a local crop
    strides = [m.stride for m in backbone.patch_embed.modules() if isinstance(m, torch.nn.Conv2d)]
    assert strides == [(2, 2)] * (3 if side == 64 else 2) + [(1, 1)]
    info = StudentInfo.from_dict(describe_student(config).to_dict())
    rebuilt = adapt_stem(timm.create_model(info.name, **info.timm_kwargs), info.output_stride, info.conv_stem)
    rebuilt.load_state_dict(backbone.state_dict())
    export_weights(backbone, info, tmp_path / "student.safetensors")
    loaded, _ = load_student(tmp_path / "student.safetensors")
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(images), backbone(images))
        torch.testing.assert_close(loaded(images), backbone(images))
    assert not is_for_timm(info)


@pytest.mark.parametrize(
    "changes", [{"name": "resnet18"}, {"small_images": False}, {"image_size": 96, "small_images": None}]
)
def test_convolutions_are_for_small_vits(changes):
    with pytest.raises(MisuseError, match=r"`conv_stem` is for ViTs in their small-image form, and .* is none"):
        describe_student(replace(CONVOLUTIONS, **changes))


@pytest.mark.parametrize("wrong", [{"conv_stem": 1}, {"small_images": False}, {"timm_kwargs": {"num_classes": 0}}])
def test_made_up_convolutions_are_refused(wrong):
    with pytest.raises(ValueError, match="none that a student has"):
        StudentInfo.from_dict(describe_student(CONVOLUTIONS).to_dict() | wrong)


def test_drop_path_changes_training_only():
    config = StudentConfig("vit_tiny_patch16_224", 32, small_images=True, drop_path=0.5)
    backbone = build_student(config)
    assert describe_student(config) == describe_student(StudentConfig("vit_tiny_patch16_224", 32, small_images=True))
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(backbone(images), backbone(images))
        assert torch.equal(backbone.eval()(images), backbone(images))


def test_drop_path_of_a_network_that_has_none_is_one_sentence():
    with pytest.raises(MisuseError, match=r"`drop_path` 0\.1: ghostnet_050 has no stochastic depth"):
        build_student(StudentConfig("ghostnet_050", 64, drop_path=0.1))


def test_resnet_d_keeps_its_deep_stem():
    backbone = build_student(StudentConfig("resnet18d", 32, small_images=True)).eval()
    with torch.no_grad():
        assert backbone.forward_features(torch.randn(1, 3, 32, 32)).shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    "name", ["mobilenetv2_050", "mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0"]
)
def test_residual_blocks_of_a_mobile_network_start_as_the_identity_and_can_leave_it(name):
    backbone = build_student(StudentConfig(name, 32, small_images=True)).train()
    blocks = [block for block in backbone.modules() if getattr(block, "has_skip", False)]
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda _, given, result: seen.append(torch.equal(given[0], result)))
    backbone(torch.randn(8, 3, 32, 32)).square().mean().backward()
    assert seen and all(seen)
    assert all(any(p.grad.any() for p in block.parameters()) for block in blocks)


def test_a_mobile_network_without_batchnorm_is_built():
    assert build_student(StudentConfig("efficientnet_b0_gn", 32, small_images=True)).num_features == 1280


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(MisuseError, match=r"did you mean .*vit_tiny_patch16_224"):
        build_student(StudentConfig("vit_tinny_patch16_224"))


def test_a_family_without_a_small_form_is_refused():
    with pytest.raises(MisuseError, match="no small-image form"):
        build_student(StudentConfig("convnext_atto", 32, small_images=True))


def test_a_crop_that_is_no_whole_number_of_patches_is_refused():
    backbone = build_student(StudentConfig("vit_tiny_patch16_224", 32, small_images=True))
    check_input_size(backbone, 16)
    with pytest.raises(MisuseError, match="30 x 30"):
        check_input_size(backbone, 30)
    assert backbone.training


def test_a_look_at_the_size_of_images_compiles_nothing():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    backbone = build_student(StudentConfig("test_resnet", 32, small_images=False))
    backbone.compile(backend=backend)
    check_input_size(backbone, 32)
    assert not compiled
    backbone(torch.zeros(2, 3, 32, 32))
    assert compiled


def test_counts_agree_with_hand_counts():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert num_parameters(backbone) == 3 * 8 * 9
    assert num_macs(backbone, 10) == 3 * 8 * 9 * 10 * 10
    vit = create_student(describe_student(StudentConfig("vit_tiny_patch16_224")))
    tokens, width, depth = 197, 192, 12
    blocks = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)  # linear layers, then the products of attention
    assert num_macs(vit, 224) == blocks + 196 * width * 3 * 16 * 16


@pytest.mark.parametrize(("side", "small", "tokens"), [(32, True, 64), (64, True, 64), (64, False, 16)])
def test_small_images_have_eight_patches_a_side(side, small, tokens):
    backbone = build_student(StudentConfig("test_vit", side, small_images=small))
    assert backbone.patch_embed(torch.zeros(1, 3, side, side)).flatten(1, -2).shape[1] == tokens


def test_a_vit_drops_the_objectives_share_of_patches():
    vit, cnn = StudentConfig("vit_tiny_patch16_224"), StudentConfig("resnet18")
    assert with_usual_patch_drop(vit, 0.15).patch_drop == 0.15
    asked = replace(vit, patch_drop=0.0)
    assert with_usual_patch_drop(asked, 0.15) is asked
    assert with_usual_patch_drop(vit, None) is vit
    assert with_usual_patch_drop(cnn, 0.15) is cnn
    assert {name for name, kind in OBJECTIVES.items() if kind.patch_drop} == {"msn"}
