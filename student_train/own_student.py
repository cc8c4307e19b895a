"""Students that are not timm's: torchvision's by ``torchvision/NAME``, and the user's own by ``package.module:factory``.

What is trained is a part of the whole network (``common/own_network.py``); what is written is the whole, by its own names.
"""

import warnings
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import StochasticDepth

from ..common.errors import MisuseError, unknown_name
from ..common.exported import TORCHVISION, StudentInfo
from ..common.factories import build_named
from ..common.own_network import INPUT, OwnNetwork, parts_of


def create_own(info: StudentInfo) -> OwnNetwork:
    """The network that ``info`` describes, as its builder initialises it. MisuseError: it cannot be built, is none of the user's,
    or makes no features.
    """
    layer = info.features
    if info.name.startswith(TORCHVISION):
        model = torchvision_model(info.name)
        layer = layer or _before_the_classifier(info.name, model)
    else:
        model = build_named(info.name)
    student = OwnNetwork(model, layer, info.image_size, f"student {info.name}", "student_features")
    return student.to(memory_format=torch.channels_last)


def torchvision_model(name: str, pretrained: bool = False) -> nn.Module:
    """torchvision's own, with random weights or its published ones. MisuseError: unknown, or they cannot be fetched."""
    plain = name.removeprefix(TORCHVISION)
    if plain not in models.list_models():
        raise unknown_name("torchvision model", plain, models.list_models())
    arguments: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in signature(models.get_model_builder(plain)).parameters:
        arguments["weights_backbone"] = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet's and Inception's way to begin
            return models.get_model(plain, **arguments)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise MisuseError(
            f"`init` pretrained: torchvision's weights of {plain} cannot be fetched ({reason}); `init` takes a file of them, too"
        ) from error


def _before_the_classifier(name: str, model: nn.Module) -> str:
    """What goes into the last linear layer of a classifier. MisuseError: it is none."""
    linear = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
    if name.removeprefix(TORCHVISION) not in models.list_models(module=models) or not linear:
        tops = ", ".join(layer for layer, _ in model.named_children())
        raise MisuseError(
            f"`student` {name} is no classifier whose last layer could be left out: name the layer to pool with "
            f"`student_features`, such as backbone; it has {tops}"
        )
    return linear[-1] + INPUT


def still_tensors(student: OwnNetwork) -> list[str]:
    """Names of those of the network that training leaves as they were."""
    return [name for name in student.model.state_dict() if name not in student.moved]


def what_moves(student: OwnNetwork) -> str:
    """A sentence: which of the network's tensors training changes, and which not."""
    names, still = list(student.model.state_dict()), still_tensors(student)
    moving = [name for name in names if name in student.moved]
    what = f"trained: {len(moving)} of {len(names)} tensors ({parts_of(moving, still)})"
    rest = f"; as they were: {len(still)} ({parts_of(still, moving)})" if still else ""
    return f"{what}{rest}; all are written by the network's own names"


def still_depth(network: nn.Module) -> None:
    """torchvision's stochastic depth lets every path through, as a copy that makes targets has it."""
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0


class OwnClassifier(nn.Module):
    """A student of the user's own with a linear classifier: images (N, 3, S, S) to logits (N, C)."""

    def __init__(self, backbone: OwnNetwork, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def get_classifier(self) -> nn.Linear:
        """As timm's."""
        return self.head
