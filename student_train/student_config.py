"""What can be set of a student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..common.errors import MisuseError
from ..common.factories import is_factory, name_factory
from ..common.settings import Setting, check

PRETRAINED = "pretrained"
"""``init`` of weights that the network's own library publishes."""


@dataclass(frozen=True)
class StudentConfig:
    """Which student to build. In Python ``name`` may also be a function that builds a network, or a network."""

    name: Annotated[
        str,
        Setting(
            "Any timm model: vit_tiny_patch16_224, resnet18, mobilenetv3_small_100 ... (rob students lists some, with their "
            "presets); torchvision/NAME; or package.module:factory, a function of yours, called without arguments, that returns "
            "a torch.nn.Module: images (B, 3, S, S) to features (B, F), or see --student-features.",
            option="--student",
        ),
    ] = "vit_tiny_patch16_224"
    image_size: Annotated[int, Setting("Side in pixels of the student's global crops.", low=8)] = 224
    small_images: Annotated[
        bool | None,
        Setting("A stem that reduces less, for up to 64 px; default by --image-size, and by the time there is."),
    ] = None
    drop_path: Annotated[float, Setting("Stochastic depth; 0.1 for ViTs trained long.", low=0, high=0.9)] = 0.0
    patch_drop: Annotated[
        float | None,
        Setting(
            "ViTs: share of the patches of a global crop that a training step leaves out; default 0.15 for msn (RoB has 0.1 "
            "for a ViT-Ti), else 0. Local crops, targets and evaluation see all. Saves time, too. A loss that stays high: less.",
            low=0,
            high=0.9,
        ),
    ] = None
    conv_stem: Annotated[
        bool | None,
        Setting(
            "ViTs with --small-images: convolutions of stride 2 in the place of the patches' one, with which they learn more in "
            "a short run, at a higher rate; rob loads such a network, timm alone does not. Default where the plan chooses the "
            "batch or the epochs: yes.",
        ),
    ] = None

    features: Annotated[
        str | None,
        Setting(
            "Of a network that is not timm's: the layer whose output is pooled (a map or tokens to their mean, several side by "
            "side), such as backbone of a detector, or with :in behind it what goes into the layer, such as fc:in. What "
            "it takes to compute it is trained in place, the rest stays as it was, and RUN/student.safetensors has the whole "
            "by its own names. Default what the network returns; of torchvision's classifiers what their last layer is given.",
            option="--student-features",
        ),
    ] = None
    init: Annotated[
        str | None,
        Setting(
            "Where its weights begin: pretrained (timm's or torchvision's published ones: from their cache, or fetched), a file "
            "(.safetensors, or .pth, read without running code), or RUN, a finished run of yours. Tensors go by their names; "
            "those of other shapes begin at random, and are named. A tenth of the usual --lr keeps more of it. Default random."
        ),
    ] = None
    init_prefix: Annotated[
        str | None,
        Setting("With --init FILE: only tensors whose names begin so, such as backbone. or encoder., and without it."),
    ] = None
    mean: Annotated[
        tuple[float, float, float] | None,
        Setting(
            "Red, green and blue, in units of 1, that images are normalised with: what the network will be given later. Default "
            "that of --init, else ImageNet's 0.485,0.456,0.406.",
            option="--student-mean",
        ),
    ] = None
    std: Annotated[
        tuple[float, float, float] | None,
        Setting("The same of the deviation; ImageNet's is 0.229,0.224,0.225.", low=1e-3, option="--student-std"),
    ] = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or is_factory(self.name):
            object.__setattr__(self, "name", name_factory(self.name))
        if isinstance(self.init, Path):
            object.__setattr__(self, "init", str(self.init))
        check(self)
        if self.init_prefix is not None and self.init in (None, PRETRAINED):
            raise MisuseError(f"`init_prefix` {self.init_prefix} is of the names in a file: give `init` FILE with it")
