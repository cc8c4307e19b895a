"""What can be set of fine-tuning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ...common.config import Device, Overwrite, Precision, Seed
from ...common.settings import Setting, check
from ...common.views.config import LoaderConfig
from ..evaluate.config import INITS

AUGMENTS = ("light", "medium", "heavy")

Run = Annotated[Path, Setting("A run folder or a student's weights.", argument="RUN")]
Out = Annotated[Path, Setting("Folder for the weights, the log and the checkpoint; killed, the same command goes on.")]
Init = Annotated[
    str, Setting("student, or random: the same network untrained, to see what the student is worth.", choices=INITS)
]
Side = Annotated[int | None, Setting("Side in pixels of what the network sees; default the student's.", low=8)]
Epochs = Annotated[
    int,
    Setting("Passes over TRAIN, of which the best on VAL is kept. 10 to 30 from a student, 100 from random.", low=1),
]
Rate = Annotated[
    float,
    Setting(
        "Peak learning rate of AdamW. Lower it when validation is best in the first epochs, or the loss is NaN.",
        low=1e-8,
        high=10,
        option="--lr",
    ),
]
Flip = Annotated[
    float, Setting("Probability of a mirrored image; 0 where left and right differ (text, digits).", low=0, high=1)
]


@dataclass(frozen=True)
class ClassifyConfig:
    """A classifier: all layers trained with AdamW, a linear warm-up over a tenth of the steps, 500 at most, a cosine to 0."""

    run: Run
    train: Annotated[Path, Setting("Labelled images, packed: one folder a class.", argument="TRAIN.beton")]
    val: Annotated[Path, Setting("Labelled images, packed, that choose the best epoch.")]
    out: Out
    init: Init = "student"
    size: Side = None
    augment: Annotated[
        str,
        Setting(
            "light: crops of half the image and more. medium: of a quarter, colours jittered. heavy: of 8 %, colours, random "
            "erasing, mixup and cutmix, for 50 epochs and more. All flip images (`--flip`).",
            choices=AUGMENTS,
        ),
    ] = "medium"
    flip: Flip = 0.5
    mixup: Annotated[float | None, Setting("Alpha of timm's mixup; default 0, heavy 0.2.", low=0, high=10)] = None
    cutmix: Annotated[float | None, Setting("Alpha of timm's cutmix; default 0, heavy 1.", low=0, high=10)] = None
    smoothing: Annotated[float, Setting("Of labels.", low=0, high=0.9)] = 0.1
    epochs: Epochs = 20
    lr: Rate = 5e-4
    weight_decay: Annotated[float, Setting("Of weights, not of biases, norms and position embeddings.", low=0)] = 0.05
    precision: Precision = "auto"
    seed: Seed = 0
    overwrite: Overwrite = False
    device: Device = "auto"
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SegmentConfig:
    """A segmenter: all layers trained as a classifier's. Masks lie in one of the layouts of ``evaluate.segmentation.layouts``."""

    run: Run
    train: Annotated[
        Path,
        Setting(
            "Images with masks: a folder with images/ and masks/ (PNG, one number a pixel, 255 ignored; names in classes.txt), "
            "images/PART beside masks/PART, COCO's annotations/instances_PART.json, VOC's ImageSets/Segmentation/PART.txt, or "
            "ADE20K's images/PART.",
            argument="TRAIN",
        ),
    ]
    val: Annotated[Path, Setting("The same, to choose the best epoch by.")]
    out: Out
    init: Init = "student"
    size: Side = None
    channels: Annotated[int, Setting("Of the pyramid and the head; 128 for many classes on a GPU.", low=8)] = 64
    crop: Annotated[
        float, Setting("Smallest crop as a share of the image's area; 1 shows all of it.", low=0.01, high=1)
    ] = 0.3
    flip: Flip = 0.5
    colour: Annotated[float, Setting("Jitter of brightness, contrast and saturation; 0: none.", low=0, high=1)] = 0.3
    epochs: Epochs = 20
    batch_size: Annotated[int, Setting("Images a step; lower it when memory runs out.", low=1)] = 8
    lr: Rate = 5e-4
    weight_decay: Annotated[float, Setting("Of weights, not of biases, norms and position embeddings.", low=0)] = 0.05
    precision: Precision = "auto"
    seed: Seed = 0
    workers: Annotated[int, Setting("Decoding processes; 0 decodes in the main one.", low=0)] = 0
    overwrite: Overwrite = False
    device: Device = "auto"

    def __post_init__(self) -> None:
        check(self)
