"""What can be set of stage 1: the teacher, its cache, and the check of one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..common.config import Checkpoint, Data, Device, LocalDir, Precision, Seed, TeacherName, ViewSize, Workers
from ..common.errors import MisuseError
from ..common.factories import is_factory, name_factory
from ..common.settings import Setting, check
from ..common.store.encodings import Encoding
from ..common.store.patches import PatchChoice
from ..common.views.config import LoaderConfig
from ..common.views.recipes import USUAL_RECIPE, Recipe, get_recipe

TEACHER_FEATURES = ("cls", "mean", "cls+mean")
OF_ITS_OWN = ("mean", "std", "size")
"""Settings of a teacher of the user's own."""


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher, from which file. In Python ``name`` may also be a function that builds a network, or a network."""

    name: TeacherName
    checkpoint: Checkpoint = None
    backbone_args: Annotated[
        Mapping[str, Any],
        Setting(
            "NAME=VALUE for timm, where the network is not of the usual shape of its name: img_size=32 and patch_size=4 of a ViT "
            "for small images; give it several times.",
            option="--backbone-arg",
            kind=tuple[str, ...],
        ),
    ] = field(default_factory=dict)
    """What the command line has, NAME=VALUE texts, becomes one."""
    teacher_features: Annotated[
        str | None,
        Setting(
            "Of a ViT without a head (DINOv2, DINOv3, timm's): cls, its class token; mean, of its patch tokens; cls+mean, both, "
            "twice as wide, with which DINOv2 and DINOv3 are best evaluated. Default what is published.",
            choices=TEACHER_FEATURES,
        ),
    ] = None

    mean: Annotated[
        tuple[float, float, float] | None,
        Setting(
            "Of a teacher of your own (package.module:factory): red, green and blue, in units of 1, that its images are "
            "normalised with, such as 0.485,0.456,0.406. Default what the network has as .mean, or timm's default_cfg.",
            option="--teacher-mean",
        ),
    ] = None
    std: Annotated[
        tuple[float, float, float] | None,
        Setting(
            "Of a teacher of your own: the standard deviation that its images are normalised by, such as 0.229,0.224,0.225. "
            "Default what the network has as .std.",
            low=1e-3,
            option="--teacher-std",
        ),
    ] = None
    size: Annotated[
        int | None,
        Setting(
            "The side in pixels of the images of a teacher of your own. Default what the network has as .image_size.",
            low=8,
            option="--teacher-size",
        ),
    ] = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or is_factory(self.name):
            object.__setattr__(self, "name", name_factory(self.name, "teacher"))
        elif (given := next((name for name in OF_ITS_OWN if getattr(self, name) is not None), None)) is not None:
            raise MisuseError(
                f"`teacher_{given}` is for a teacher of your own, package.module:factory; {self.name} has its own: leave it out"
            )
        check(self)
        if not isinstance(self.backbone_args, Mapping):
            object.__setattr__(self, "backbone_args", dict(map(_named, self.backbone_args)))


def _named(text: str) -> tuple[str, Any]:
    """``img_size=32`` -> its name and its value, a number where it is one."""
    name, _, value = text.partition("=")
    if not name.isidentifier() or not value:
        raise MisuseError(f"`backbone_args` {text!r} is no NAME=VALUE: write it as img_size=32")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@dataclass(frozen=True)
class CacheConfig:
    """What to cache. ``views`` a image get ids 0 .. views-1."""

    data: Data
    out: Annotated[
        Path,
        Setting(
            "The target store to write, to go on with, or, where it is whole, to give more views or the rows of appended images. "
            "A path, or an address: s3://, gs:// or az://BUCKET/NAME.zarr.",
            argument="OUT.zarr",
            address=True,
        ),
    ]
    teacher: TeacherConfig
    recipe: Recipe = field(default_factory=lambda: get_recipe(USUAL_RECIPE))
    views: Annotated[
        int,
        Setting(
            "Views of every image; the student rotates through them. Each costs one teacher forward; in nine passes over the "
            "images 4 were as good as 16.",
            low=1,
        ),
    ] = 4
    seed: Seed = 0
    encoding: Encoding = field(default_factory=Encoding)
    patches: PatchChoice = field(default_factory=PatchChoice)
    view_size: ViewSize = None
    prototypes: Annotated[
        int, Setting("Fit so many prototypes for a teacher without a head; at most a quarter of the views.", low=0)
    ] = 0
    part: Annotated[
        str | None,
        Setting(
            "K/N: write the K-th of N parts and exit, for the jobs of an array; the last one completes the store. Restart a "
            "killed job with the same K/N. Not needed under torchrun.",
        ),
    ] = None
    local_dir: LocalDir = None
    precision: Precision = "auto"
    device: Device = "auto"
    loader: Annotated[
        LoaderConfig,
        {
            "batch_size": Setting(
                "Images a batch; the teacher sees a view of each at once. Lower it when memory runs out.", low=1
            )
        },
    ] = field(default_factory=lambda: LoaderConfig(batch_size=128))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class VerifyConfig:
    """What to verify, against which data and teacher. ``samples`` views are drawn without replacement by ``seed``; more than
    there are means all.
    """

    store: Annotated[Path, Setting("A target store.", argument="STORE")]
    data: Data
    teacher: TeacherConfig
    samples: Annotated[int, Setting("Random views to compute again with the live teacher.", low=1)] = 256
    seed: Seed = 0
    device: Device = "auto"
    precision: Annotated[
        str | None,
        Setting("Default the store's. fp32 for one cached with fp16 on a GPU, where there is only a CPU."),
    ] = None
    tolerance: Annotated[
        float | None,
        Setting("Distance a unit embedding may have moved; default by precision. On one machine 1e-4 will do."),
    ] = None
    batch_size: Annotated[int, Setting("Images a forward pass. Lower it when memory runs out.", low=1)] = 64
    workers: Workers = 0

    def __post_init__(self) -> None:
        check(self)
        if self.tolerance is not None and not 0 < self.tolerance < 2:
            raise MisuseError(
                f"`tolerance` is {self.tolerance}, expected a distance of unit vectors: above 0 and below 2"
            )
