"""Students: timm backbones by name, their small-image forms, and the description that rebuilds one from its weights.

A student is a timm model without a classifier, ``(B, 3, S, S) -> (B, num_features)``, that takes every crop size of a
multi-crop recipe (224 and 96, 32 and 16) with the same weights.

Small images (<= 64 px). A network made for 224 px reduces its input 32-fold and ends with one position at 32 px. The
small form ends with 4 x 4 positions (ViT: 8 x 8 tokens) instead, as usual on CIFAR:

=============================  ===============================  =======================================  ====================
family                         up to 32 px                      up to 64 px                              made by
=============================  ===============================  =======================================  ====================
ViT, DeiT                      patches of 4 px                  patches of 8 px                          timm arguments alone
with ``conv_stem``             2 convolutions of stride 2       3 of them                                ``adapt_stem``
ResNet                         3x3 stem of stride 1, no pool    no max-pool                              ``adapt_stem``
MobileNet, EfficientNet        stride 1 in the stem and in the  stride 1 in the first stage that halves  ``adapt_stem``
                               first stage that halves
=============================  ===============================  =======================================  ====================

Weights of an ordinary student and of any ViT with one patch embedding load with timm alone: ``timm.create_model(info.name,
**info.timm_kwargs).load_state_dict(load_file(path))``. timm has no argument for the strides of a CNN nor for a ViT's
convolutions, so these take one more call, ``adapt_stem(model, info.output_stride, info.conv_stem)``, between the two;
``checkpoint.load_student(path)`` serves every case. Students that are not timm's are in ``own_student.py``.
"""

import re
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models import model_entrypoint
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    UniversalInvertedResidual,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..common.errors import MisuseError, first_line, is_out_of_memory, unknown_name
from ..common.exported import StudentInfo, adapt_stem, is_own
from ..common.own_network import OwnNetwork
from ..common.patches import feature_map
from .own_student import create_own
from .student_config import StudentConfig

VIT_PATCH = 16
"""Pixels a side of an ordinary ViT's patch."""

VIT_FAMILIES = ("vision_transformer", "deit")
MOBILE_FAMILIES = ("efficientnet", "mobilenetv3")
MOBILE_BLOCKS = (DepthwiseSeparableConv, InvertedResidual, EdgeResidual, UniversalInvertedResidual)
SMALL_SIDE = 64
"""Pixels a side of the largest images that the small form is for."""
USUAL = ("vit_tiny_patch16_224", "resnet18", "mobilenetv3_small_100", "mobilenetv2_050", "efficientnet_lite0")
"""Students that are offered first where a name is unknown."""
SMALL_IMAGE_FAMILIES = (*VIT_FAMILIES, *MOBILE_FAMILIES, "resnet")
OWN = "of its own"
"""The family of a student that is not timm's."""


def describe_student(config: StudentConfig) -> StudentInfo:
    """The description of ``config``'s student. MisuseError: a name unknown to timm, or one with no small-image form."""
    normalised = {name: value for name in ("mean", "std") if (value := getattr(config, name)) is not None}
    kwargs: dict[str, Any] = {"num_classes": 0}
    family = model_family(config.name)
    small = is_small(config)
    if small and family not in SMALL_IMAGE_FAMILIES:
        raise MisuseError(
            f"student {config.name!r} has no small-image form (ViT, ResNet, MobileNet and EfficientNet have): "
            "choose one of those, or do without `small_images`"
        )
    if config.conv_stem and not (small and family in VIT_FAMILIES):
        raise MisuseError(f"`conv_stem` is for ViTs in their small-image form, and {config.name} is none: leave it out")
    if family == OWN:
        return StudentInfo(config.name, {}, config.image_size, small, **normalised, features=config.features)
    if config.features is not None:
        raise MisuseError(
            f"`student_features` {config.features} is for networks that are not timm's, and {config.name} is: leave it out"
        )
    if family in VIT_FAMILIES:
        # One set of position embeddings, interpolated to the crop at hand.
        kwargs |= {"img_size": config.image_size, "dynamic_img_size": True}
        if small:
            kwargs["patch_size"] = vit_patch(config)
        conv_stem = config.conv_stem or None  # so files without one say the same as from before there was a choice
        return StudentInfo(config.name, kwargs, config.image_size, small, **normalised, conv_stem=conv_stem)
    # 8 goes without saying: so files from before there was a choice, and those of today, say the same.
    stride = 16 if output_stride(config) == 16 else None
    return StudentInfo(config.name, kwargs, config.image_size, small, **normalised, output_stride=stride)


def is_small(config: StudentConfig) -> bool:
    """Whether the student has its small-image form: by the size of its images, where nothing else is said and it has one."""
    if config.small_images is None:
        return config.image_size <= SMALL_SIDE and model_family(config.name) in SMALL_IMAGE_FAMILIES
    return config.small_images


def vit_patch(config: StudentConfig) -> int:
    """Pixels a side of a ViT student's patch: those in timm's name. Small images have 8 x 8 of them at 32 px and at 64."""
    if is_small(config):
        return 4 if config.image_size <= SMALL_SIDE // 2 else 8
    named = re.search(r"_patch(\d+)", config.name)
    return int(named[1]) if named else VIT_PATCH


def output_stride(config: StudentConfig) -> int:
    """Pixels a side of the student's images that become one position of a CNN's map, as usual networks have it."""
    return 32 if not is_small(config) else 8 if config.image_size <= SMALL_SIDE // 2 else 16


def stride_of(config: StudentConfig) -> int:
    """The same of any student: of a ViT its patch."""
    family = model_family(config.name)
    if family == OWN:
        return 1  # nobody knows
    if family in VIT_FAMILIES:
        return vit_patch(config)
    return output_stride(config)


def build_student(config: StudentConfig) -> nn.Module:
    """A freshly initialised student, ``(B, 3, S, S) float -> (B, num_features)``, from torch's global generator.

    ``.num_features`` is the width of what it returns. MisuseError as ``describe_student``.
    """
    return create_student(describe_student(config), config.drop_path, config.patch_drop or 0.0)


def create_student(info: StudentInfo, drop_path: float = 0.0, patch_drop: float = 0.0) -> nn.Module:
    """The network that ``info`` describes, with random weights. Stochastic depth and patch drop are for training and no part
    of it. MisuseError: the network lacks the one that is asked for.
    """
    model_family(info.name)
    for_training = {"drop_path_rate": drop_path, "patch_drop_rate": patch_drop}
    kwargs: dict[str, Any] = dict(info.timm_kwargs) | {name: rate for name, rate in for_training.items() if rate}
    no_depth = f"`drop_path` {drop_path:g}: {info.name} has no stochastic depth, leave it out or pass 0"
    no_patches = (
        f"`patch_drop` {patch_drop:g}: {info.name} has no patches to drop, as ViTs have: leave it out or pass 0"
    )
    if info.is_own:
        if drop_path or patch_drop:
            raise MisuseError(no_depth if drop_path else no_patches)
        return create_own(info)
    try:
        backbone = timm.create_model(info.name, pretrained=False, **kwargs)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise MisuseError(no_depth) from None
        if "patch_drop_rate" in str(error):
            raise MisuseError(no_patches) from None
        raise
    if patch_drop and not patch_dropouts(backbone):
        raise MisuseError(no_patches)
    if info.small_images:
        adapt_stem(backbone, info.output_stride, info.conv_stem)
    start_residuals_at_zero(backbone)
    # timm counts MobileNetV3's features before the last layer of its head; a projection head wants what comes out.
    backbone.num_features = backbone.head_hidden_size
    # Depthwise convolutions train about 2.5 times as fast in this layout, on CPU and on tensor cores, and cuDNN turns no batch
    # around; a ViT is unmoved.
    return backbone.to(memory_format=torch.channels_last)


def with_usual_patch_drop(config: StudentConfig, share: float | None) -> StudentConfig:
    """The same, a ViT with the objective's ``share`` of dropped patches where nothing else is asked for."""
    if config.patch_drop is not None or share is None or model_family(config.name) not in VIT_FAMILIES:
        return config
    return replace(config, patch_drop=share)


def patch_dropouts(backbone: nn.Module) -> list[nn.Module]:
    """The layers that drop patches after the position embedding while they are in training mode; class token and registers
    stay (2208.07220)."""
    return [module for module in backbone.modules() if isinstance(module, (PatchDropout, PatchDropoutWithIndices))]


def start_residuals_at_zero(backbone: nn.Module) -> None:
    """Let every residual branch of a MobileNet or EfficientNet begin as zero, in place, as timm's ResNets do already.

    The scale of the BatchNorm that ends a branch becomes 0 (Goyal et al. 2017, section 5.1), so that a block is at first
    the identity. Without it MobileNetV2's gradients grow over its 52 convolutions until those of the stem drown all others,
    and MoCo's loss did not fall in 20 epochs of 5,000 images (``benchmarks/momentum.py``). Other networks are left as they are.
    """
    for block in backbone.modules():
        if isinstance(block, MOBILE_BLOCKS) and block.has_skip:
            norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
            if norms:  # a few variants have GroupNorm
                nn.init.zeros_(norms[-1].weight)


def check_input_size(backbone: nn.Module, size: int) -> None:
    """MisuseError where the student cannot take images of ``size`` x ``size`` pixels."""
    try:
        _forward_one(backbone, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error).rstrip(".")
        raise MisuseError(f"the network cannot take images of {size} x {size} px: {reason}") from error


def pooled_and_map(backbone: nn.Module, images: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
    """Features (N, F) as ``backbone(images)`` gives them, and a map (N, C, h, w): of the last layer, or of block or stage
    ``layer``, from 0, or from the end if negative. MisuseError: a network that is not timm's has no such thing.
    """
    if isinstance(backbone, OwnNetwork):
        if layer is not None:
            raise MisuseError("a network that is not timm's has no stages by number, name its layer instead")
        return backbone.with_map(images)
    model: Any = backbone
    if layer is None:
        features = model.forward_features(images)
        return model.forward_head(features), feature_map(backbone, features)
    features, (found,) = model.forward_intermediates(images, indices=[layer])
    return model.forward_head(features), found


@torch.no_grad()
def map_shape(backbone: nn.Module, size: int, layer: int | None, name: str) -> tuple[int, int]:
    """Channels and positions a side of that map, of images of ``size`` pixels. MisuseError: the student ``name`` has none."""
    check_input_size(backbone, size)
    weight, training = next(backbone.parameters()), backbone.training
    try:
        black = torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype)
        found = pooled_and_map(backbone.eval(), black, layer)[1]
    except (AttributeError, AssertionError, IndexError, ValueError, MisuseError) as error:
        which = "its last layer" if layer is None else f"`patch_layer` {layer}"
        raise MisuseError(
            f"student {name} gives no map of features at {which} ({error}): take another, or `objective` embedding"
        ) from None
    finally:
        backbone.train(training)
    return found.shape[1], found.shape[2]


def model_family(name: str) -> str:
    """timm's module for the architecture ``name``, such as ``resnet``, or ``OWN``. MisuseError, with the nearest names:
    unknown."""
    if is_own(name):
        return OWN
    if not timm.is_model(name):
        raise unknown_name("student", name, timm.list_models(), USUAL)
    return model_entrypoint(name).__module__.rpartition(".")[-1]


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_macs(backbone: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image's forward pass: convolutions, linear layers and attention products."""
    # The counter sees the two products of attention only where they are not fused.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _forward_one(backbone, image_size)
    return counter.get_total_flops() // 2


@torch.no_grad()
def _forward_one(backbone: nn.Module, size: int) -> None:
    """One black image through the network, without touching its batch statistics."""
    weight = next(backbone.parameters())
    training = backbone.training
    try:
        # not called: a compiled network would be compiled for this one image
        backbone.eval().forward(torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype))
    finally:
        backbone.train(training)
