"""What a weights file of ours says of its network, so that both stages can build it; a CNN's small-image form."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import MixedConv2d
from timm.models import EfficientNet, MobileNetV3, ResNet
from torch import nn

from .errors import MisuseError
from .factories import is_factory
from .files import open_regular
from .records import parsed

TIMM_KWARGS = frozenset(("num_classes", "img_size", "dynamic_img_size", "patch_size"))
"""All that ``describe_student`` has timm called with; nothing else in a file's description is."""
LARGEST_SIDE = 1 << 14
"""Pixels a side of an image that a description may name."""
OUTPUT_STRIDES = (8, 16)
"""That ``adapt_stem`` can give a CNN."""
CONV_PATCHES = (4, 8)
"""Pixels a side of the patches that it can make of convolutions."""
TORCHVISION = "torchvision/"
"""Begins the name of a student that is torchvision's."""


def is_own(name: str) -> bool:
    """Whether a student of that name is not timm's, but torchvision's or of the user's own code."""
    return name.startswith(TORCHVISION) or is_factory(name)


@dataclass(frozen=True)
class StudentInfo:
    """All that a weights file needs beside its tensors: how to rebuild the network, and the pixels it expects.

    ``mean`` and ``std`` (RGB, in units of 1) normalise its input. ``features`` is the layer that is pooled of a network that is
    not timm's; None: what it returns. ``output_stride`` is the one that ``adapt_stem`` gives a CNN in its small-image form; None:
    8. ``conv_stem``: it puts convolutions in the place of a ViT's patch embedding; None: it does not. Written into the weights
    file as JSON.
    """

    name: str
    timm_kwargs: Mapping[str, Any]
    image_size: int
    small_images: bool
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    features: str | None = None
    output_stride: int | None = None
    conv_stem: bool | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is not timm's."""
        return is_own(self.name)

    def to_dict(self) -> dict[str, Any]:
        """What is None is left out, as in files from before there was such a thing."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudentInfo":
        """Undoes ``to_dict``, of a file that may come from anywhere. ValueError: it is no description of a student, or one with
        which timm would do more than build it (``checkpoint_path`` has it unpickle a file)."""
        values = {"features": None, "output_stride": None, "conv_stem": None, **values}
        kwargs, features, stride = values.get("timm_kwargs", {}), values["features"], values["output_stride"]
        unknown = (values.keys() ^ {field.name for field in fields(cls)}) | (kwargs.keys() - TIMM_KWARGS)
        if unknown:
            raise ValueError(f"no student has {', '.join(sorted(unknown))}")
        sides = [values["image_size"], *(value for name, value in kwargs.items() if name != "num_classes")]
        sound = isinstance(values["name"], str) and isinstance(values["small_images"], bool)
        sound &= (
            (not kwargs and not values["small_images"]) if is_own(values["name"]) else kwargs.get("num_classes") == 0
        )
        sound &= features is None or (isinstance(features, str) and is_own(values["name"]))
        sound &= stride is None or (stride in OUTPUT_STRIDES and values["small_images"])
        sound &= values["conv_stem"] is None or (
            values["conv_stem"] is True and values["small_images"] and kwargs.get("patch_size") in CONV_PATCHES
        )
        sound &= all(isinstance(s, int) and 1 <= s <= LARGEST_SIDE for s in sides)
        sound &= all(len(v) == 3 and all(isinstance(x, float) for x in v) for v in (values["mean"], values["std"]))
        if not sound:
            raise ValueError("a value is none that a student has")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def read_metadata(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of itself; nothing of a file of another kind, or of none."""
    try:
        with open_regular(path):  # safetensors would wait for a pipe
            pass
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def described_in(metadata: Mapping[str, str], path: Path) -> StudentInfo | None:
    """The description that ``rob train-student`` left in the metadata of the file ``path``; None: it is not ours.

    MisuseError: damaged, or made up.
    """
    if "student" not in metadata:
        return None
    try:
        return StudentInfo.from_dict(parsed(metadata["student"].encode()))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise MisuseError(
            f"{path}: its description of the student is damaged or made up ({error}): do not use the file"
        ) from error


def adapt_stem(backbone: nn.Module, output_stride: int | None = None, conv_stem: bool | None = None) -> nn.Module:
    """Give a timm network its small-image form, in place: a CNN an output stride of 8 (None, too) or 16 rather than 32, a ViT
    with ``conv_stem`` convolutions that overlap in the place of its patches' one. Another ViT is left as it is.
    """
    keep_first = output_stride == 16
    if conv_stem:
        embed: Any = backbone.patch_embed
        embed.proj = _convolutions(embed.proj.out_channels, embed.patch_size[0])
    elif isinstance(backbone, (EfficientNet, MobileNetV3)):
        for layer in _halving_layers(backbone)[keep_first:2]:
            for conv in layer:
                conv.stride = (1, 1)
    elif isinstance(backbone, ResNet):
        backbone.maxpool = nn.Identity()
        if keep_first:
            return backbone
        if isinstance(backbone.conv1, nn.Conv2d):
            stem = nn.Conv2d(3, backbone.conv1.out_channels, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet
            backbone.conv1 = stem
        else:  # the stem of ResNet-C and -D is three 3x3 convolutions already
            _halving_layers(backbone)[0][0].stride = (1, 1)
    return backbone


def _convolutions(width: int, patch: int) -> nn.Sequential:
    """Of stride 2, as many as halve ``patch`` pixels to a position of ``width`` channels, each twice as wide as the one before
    (2106.14881, figure 1; with GELU)."""
    halvings = patch.bit_length() - 1
    widths = [3, *(max(16, width >> (halvings - 1 - layer)) for layer in range(halvings))]
    layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.GELU())
    ]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


def _halving_layers(backbone: nn.Module) -> list[list[nn.Conv2d]]:
    """The layers of stride 2, in the order of the forward pass: one convolution each, or MixNet's side by side."""
    layers: dict[str, list[nn.Conv2d]] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            parent = name.rpartition(".")[0]
            mixed = isinstance(backbone.get_submodule(parent), MixedConv2d)
            layers.setdefault(parent if mixed else name, []).append(module)
    return list(layers.values())
