"""What can be set of an export, and of sending one to the Hub."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ...common.config import Overwrite
from ...common.errors import MisuseError, unknown_name
from ...common.settings import Setting, check
from ...common.views.config import LoaderConfig

FORMATS = ("onnx", "torch", "executorch", "coreml", "litert", "timm")
WITH_INT8 = ("onnx", "executorch", "coreml", "litert")
INPUTS = ("uint8", "unit", "normalised")
CALIBRATIONS = ("minmax", "percentile")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ExportConfig:
    """Of which run, to what, and how it is checked. Files lie beside the weights, unless ``out`` says where else."""

    run: Annotated[
        Path,
        Setting(
            "A run folder, OUT of rob finetune, weights of one of them, or a detector of rob eval detect "
            "(RUN/eval/detect.safetensors): features, logits, or boxes.",
            argument="RUN",
        ),
    ]
    to: Annotated[
        tuple[str, ...],
        Setting(
            "onnx; torch, torch.export's .pt2; executorch, XNNPACK's .pte; coreml, an .mlpackage (it runs on a Mac only, so it "
            "is not checked here); litert, a .tflite (in an environment of its own); timm, a folder for timm and the Hub. "
            "Several times: several files. A detector becomes onnx alone: one picture of any size, scaled inside."
        ),
    ] = ("onnx",)
    data: Annotated[
        Path | None,
        Setting(
            "Packed images, of the kind that the device will see: the file is checked on them, and int8 calibrated. A detector "
            "needs them: with its objects in them, packed at the size that it will see."
        ),
    ] = None
    int8: Annotated[
        bool,
        Setting(
            "Also a file of 8-bit weights and activations (coreml: weights alone), for onnx, executorch, coreml, litert; needs "
            "--data.",
            option="--int8",
        ),
    ] = False
    input_form: Annotated[
        str,
        Setting(
            "uint8: (N, S, S, 3), 0..255, RGB, as a decoded picture lies in memory, normalised inside. unit: (N, 3, S, S) "
            "float32, 0..1, RGB, normalised inside. normalised: (N, 3, S, S) float32, normalised by you.",
            choices=INPUTS,
            option="--input",
        ),
    ] = "uint8"
    size: Annotated[
        int | None,
        Setting(
            "Side S of the image in pixels; default the student's. Of a detector the shorter side that it scales a picture to, "
            "default that of its training: smaller is faster and misses small things.",
            low=8,
        ),
    ] = None
    out: Annotated[Path | None, Setting("Folder for the files; default that of the weights.")] = None
    images: Annotated[
        int,
        Setting(
            "Images of --data on which the file is compared with torch; of segmenters and detectors 50 at most.", low=2
        ),
    ] = 1000
    calibration: Annotated[
        int, Setting("Images of --data that int8 is calibrated on, others where there are.", low=1)
    ] = 256
    calibrate: Annotated[
        str,
        Setting(
            "How onnx's int8 finds the range of activations: minmax, or percentile, which leaves outliers out: try it where an "
            "EfficientNet loses too much.",
            choices=CALIBRATIONS,
        ),
    ] = "minmax"
    min_agreement: Annotated[
        float | None,
        Setting(
            "Below it the file is not kept. float32: the smallest cosine with torch's output, default 0.9999. int8: 1 less the "
            "lost accuracy, of k-NN or of the classifier, default 0.97; without labels the share of images whose nearest "
            "neighbour is among torch's five nearest, or whose class is torch's, default 0.9. A detector: the share of boxes, "
            "torch's and the file's, that the other has, too (class, IoU from 0.9, score within 0.01), default 0.99.",
            low=0,
            high=1,
        ),
    ] = None
    opset: Annotated[int, Setting("Of ONNX.", low=18, high=25)] = 20
    overwrite: Overwrite = False
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(batch_size=64))

    def __post_init__(self) -> None:
        for name in self.to:
            if name not in FORMATS:
                raise unknown_name("format", name, FORMATS)
        check(self)
        if self.calibrate != "minmax" and not (self.int8 and "onnx" in self.to):
            raise MisuseError(f"`calibrate` {self.calibrate} is for onnx's int8: leave it out")
        if self.int8 and self.data is None:
            raise MisuseError("`int8` is calibrated on images: give `data`, packed by rob pack")
        if self.int8 and not set(self.to) & set(WITH_INT8):
            raise MisuseError(f"`int8` is for {', '.join(WITH_INT8)}: add one of them with `to`, or leave `int8` out")


@dataclass(frozen=True)
class PushConfig:
    """Of which run, and where to."""

    run: Annotated[Path, Setting("A run folder.", argument="RUN")]
    name: Annotated[str, Setting("USER/MODEL, as the Hub has it.", argument="USER/MODEL")]
    dry_run: Annotated[
        bool, Setting("Write RUN/hub, which would be sent, and send nothing: no network.", option="--dry-run")
    ] = False
    private: Annotated[bool, Setting("A repository that only you see, where it is new.", option="--private")] = False
    licence: Annotated[
        str | None,
        Setting(
            "Of the model, as the Hub spells it: apache-2.0, cc-by-nc-4.0. Default: the card names the teacher's alone."
        ),
    ] = None
    card: Annotated[
        Path | None,
        Setting(
            "README.md to send instead of rob's: copy RUN/hub/README.md elsewhere and edit it. RUN/hub is made anew every time."
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)
        if self.card is not None and self.licence is not None:
            raise MisuseError(
                "`licence` is for rob's card, and `card` is one of your own, which says it: leave one of them out"
            )
        if not REPOSITORY.fullmatch(self.name):
            raise MisuseError(
                f"the name {self.name!r} is none of the Hub: give USER/MODEL, of letters, digits, -, _ and ."
            )
