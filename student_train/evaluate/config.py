"""What can be set of the evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...common.config import Device, Overwrite, Seed
from ...common.errors import MisuseError
from ...common.settings import Setting, check

INITS = ("student", "random")
FEATURES = ("cls", "mean", "cls+mean", "cls4")
"""Those of ``common.tokens``."""
PROTOCOLS = ("usual", "msn")


@dataclass(frozen=True)
class LinearConfig:
    """SGD with momentum and a cosine to 0, for every pair of ``learning_rates`` and ``weight_decays`` (>= 0).

    Rates are for standardised features. ``validation`` in (0, 1) is the share of each class kept for choosing. ``batch_norm``
    has no gain and bias of its own, which the linear layer behind it makes good for.
    """

    learning_rates: Annotated[
        tuple[float, ...],
        Setting(
            "Learning rates to choose from, 0.001 to 0.1; give it several times.", low=1e-8, high=100, option="--lr"
        ),
    ] = (0.001, 0.003, 0.01, 0.03, 0.1)
    weight_decays: Annotated[
        tuple[float, ...],
        Setting("Weight decays to choose from; give it several times.", low=0, option="--weight-decay"),
    ] = (0.0, 1e-3, 1e-2, 1e-1)
    epochs: Annotated[int, Setting("Passes over TRAIN; 100 as DINO.", low=1)] = 100
    batch_norm: Annotated[
        bool,
        Setting(
            "BatchNorm before the linear layer, as in RoB's evaluation, in place of TRAIN's mean and deviation.",
            option="--batch-norm",
        ),
    ] = False
    refit: Annotated[
        bool,
        Setting(
            "Train the chosen setting anew on all of TRAIN, the images that chose it included. Without it a tenth less data, and "
            "less time: with --augment half.",
            option="--refit/--no-refit",
        ),
    ] = True
    batch_size: int = 256
    momentum: float = 0.9
    validation: float = 0.1
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LowshotConfig:
    """Logistic regression on frozen features: how rows are prepared, and how much weights are held small."""

    protocol: Annotated[
        str,
        Setting(
            "usual: unit rows, an intercept, regularisation as it is. msn: MSN's, rows centred before they are made unit, no "
            "intercept, regularisation over the number of images.",
            choices=PROTOCOLS,
        ),
    ] = "usual"
    regularisation: Annotated[
        float | None,
        Setting("Half of it times the sum of squared weights; default 0.001, or msn's 0.0025 over the images.", low=0),
    ] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class FinetuneConfig:
    """AdamW with a cosine to 0 over ``epochs`` of the subset. ``lr`` is the network's, for any batch size."""

    epochs: Annotated[int, Setting("With --finetune.", low=1)] = 30
    lr: Annotated[
        float,
        Setting("With --finetune, of the network; its classifier's is 10 times that.", low=1e-8, high=10),
    ] = 1e-4
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DetectConfig:
    """Fine-tuning of all layers with AdamW: a linear warm-up over the first tenth (500 steps at most), a cosine to 0.

    ``init`` "random" takes the architecture of ``run`` alone. ``lr`` is for any batch size.
    """

    run: Annotated[Path, Setting("A run folder or a student's weights.", argument="RUN")]
    data: Annotated[
        Path,
        Setting(
            "A folder in VOC's layout (ImageSets/Main/NAME.txt, Annotations, JPEGImages) or in COCO's "
            "(annotations/instances_NAME.json, images in NAME/).",
            argument="DATA",
        ),
    ]
    train: Annotated[str, Setting("NAME of the images to train on: train, trainval, train2017 ...")] = "train"
    test: Annotated[str, Setting("NAME of the images to test on; val while you choose settings, test once.")] = "test"
    val: Annotated[
        str | None, Setting("NAME of images, none of them TEST's, that choose the best epoch; default the last epoch.")
    ] = None
    init: Annotated[str, Setting("student, or random: the same network untrained, for comparison.", choices=INITS)] = (
        "student"
    )
    side: Annotated[
        int, Setting("Shorter side in pixels that images are scaled to. Half is four times as fast.", low=32)
    ] = 800
    channels: Annotated[int, Setting("Of the pyramid and its heads: 256 as published, 64 on a CPU.", low=8)] = 256
    epochs: Annotated[int, Setting("Passes over the training images.", low=1)] = 12
    batch_size: Annotated[int, Setting("Images a step.", low=1)] = 4
    lr: Annotated[float, Setting("Peak; lower it when the loss stops being a number.", low=1e-8, high=10)] = 2e-4
    weight_decay: float = 0.05
    seed: Seed = 0
    workers: Annotated[int, Setting("Decoding processes; 0 decodes in the main one.", low=0)] = 0
    device: Device = "auto"
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check(self)
        if self.val == self.test:
            raise MisuseError(
                f"`val` and `test` are both {self.val}: choose the best epoch by other images than it is tested on"
            )


@dataclass(frozen=True)
class SegmentConfig:
    """A BatchNorm and one linear layer a position, trained by AdamW with a cosine to 0, on maps that stay as they are."""

    train: Annotated[
        Path,
        Setting(
            "Images with a class for every pixel: a folder of images/ and masks/, images/PART beside masks/PART, COCO's "
            "annotations/instances_PART.json, VOC's ImageSets/Segmentation/PART.txt, or ADE20K's images/PART.",
            argument="TRAIN",
        ),
    ]
    test: Annotated[Path, Setting("The same to test on.", argument="TEST")]
    layer: Annotated[
        int | None,
        Setting("Block or stage whose map is probed, from 0, or from the end as -2; default the last. CNNs: try -2."),
    ] = None
    epochs: Annotated[int, Setting("Passes over the maps, which are made once.", low=1)] = 40
    batch_size: Annotated[int, Setting("Images a step.", low=1)] = 16
    lr: Annotated[float, Setting("Peak, as in DINOv2's linear segmentation.", low=1e-8, high=10)] = 1e-3
    weight_decay: float = 1e-4
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)
