"""What can be set of the evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...common.config import Device, Seed
from ...common.settings import Setting, check

INITS = ("student", "random")


@dataclass(frozen=True)
class LinearConfig:
    """SGD with momentum and a cosine to 0, for every pair of ``learning_rates`` and ``weight_decays`` (>= 0).

    Rates are for standardised features. ``validation`` in (0, 1) is the share of each class kept for choosing.
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
    batch_size: int = 256
    momentum: float = 0.9
    validation: float = 0.1
    seed: Seed = 0

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
            argument="data",
        ),
    ]
    train: Annotated[str, Setting("NAME of the images to train on: train, trainval, train2017 ...")] = "train"
    test: Annotated[str, Setting("NAME of the images to test on; val while you choose settings, test once.")] = "test"
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

    def __post_init__(self) -> None:
        check(self)
