"""timm backbones without a classifier, filled from official or timm-named weights by timm's own converters."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from ..common.errors import MisuseError, named_line
from ..common.pretrained import converted, hub_if_reachable
from ..common.tensors import Tensors


class WideResNet50(ResNet):
    """SwAV's ResNet-50 with every layer ``width`` times as wide: timm widens all but the stem, so the stem is put in here.

    94 and 375 million parameters at width 2 and 4, as SwAV's README has them.
    """

    def __init__(self, width: int, channels: int = 64, layers: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        stem = channels * width
        block: Any = Bottleneck
        super().__init__(block, layers, num_classes=0, channels=tuple(stem * 2**stage for stage in range(4)))
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        out = stem * Bottleneck.expansion
        first: Any = self.get_submodule("layer1.0")
        first.conv1 = nn.Conv2d(stem, stem, kernel_size=1, bias=False)
        first.downsample = nn.Sequential(nn.Conv2d(stem, out, kernel_size=1, bias=False), nn.BatchNorm2d(out))


WIDE_RESNETS: dict[str, Callable[..., nn.Module]] = {
    f"resnet50w{width}": partial(WideResNet50, width) for width in (2, 4)
}
"""Backbones of the registry that timm has no name for."""


def build_backbone(name: str, arguments: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """timm's ``name`` without its classifier: images (N, 3, H, W) to pooled features (N, num_features).

    A transformer with position embeddings is built so that it interpolates them to the size of the images it is given
    (timm's antialiased bicubic; the official codes interpolate a little differently, so other sizes differ slightly).
    ``arguments`` go to ``timm.create_model``; ``pretrained`` fetches timm's weights. Raises ``MisuseError`` where timm
    does not know an argument, has no such weights, or can't reach them.
    """
    if name in WIDE_RESNETS:
        return WIDE_RESNETS[name](**arguments)
    arguments = {"num_classes": 0, "pretrained": pretrained, **arguments}
    try:
        try:
            backbone: Any = timm.create_model(name, **{"dynamic_img_size": True, **arguments})
        except TypeError:  # timm hands the argument to the model, and only transformers know it
            backbone = timm.create_model(name, **arguments)
    except OSError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise MisuseError(
            f"the weights of {name} can't be downloaded ({reason}); pass a file as `checkpoint`"
        ) from error
    except Exception as error:  # a wrong value fails anywhere in the network: an assertion, a division by zero ...
        raise MisuseError(f"timm can't build {name}: {named_line(error)}") from error
    # timm counts the features of MobileNetV3, MobileNetV4 and GhostNet before the last layer of their heads.
    backbone.num_features = backbone.head_hidden_size
    return backbone


def pretrained_backbone(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """``build_backbone`` with timm's pretrained weights, from its cache or downloaded."""
    if not timm.is_model_pretrained(name):
        raise MisuseError(f"timm has no pretrained weights for {name}; pass a file as `checkpoint`")
    with hub_if_reachable():
        return build_backbone(name, arguments, pretrained=True)


def load_backbone(backbone: nn.Module, tensors: Tensors, name: str, path: Path) -> None:
    """Fill ``backbone`` with official or timm-named ``tensors``; ``MisuseError`` names the first three that don't fit."""
    expected = backbone.state_dict()
    # timm's converter stretches patches of another size to fit, and so makes a wrong teacher of another model's file.
    patches = "patch_embed.proj.weight"
    if patches in expected and patches in tensors and expected[patches].shape != tensors[patches].shape:
        found = {patches: tensors[patches]}
    else:
        found = converted(backbone, tensors)
    problems = _differences(expected, found)
    if problems:
        shown = "; ".join(problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MisuseError(f"checkpoint {path} is not a {name}: {shown}{more}")
    backbone.load_state_dict(found, strict=False)  # by now only counters of batches can be missing


def _differences(expected: Tensors, found: Tensors) -> list[str]:
    """One clause a tensor of another shape, missing or too many, in the model's own order."""
    differences = []
    for name, tensor in expected.items():
        if name not in found:
            if not name.endswith("num_batches_tracked"):
                differences.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            differences.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    return differences + [f"{name} is unknown to the model" for name in found if name not in expected]
