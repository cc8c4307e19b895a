"""A detector as ONNX: a picture of any size goes in, its boxes come out. torch's older exporter writes it, since torch.export
does not follow torchvision's choice of boxes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN

from ...common.errors import FailureError, MisuseError, first_line
from ...common.exported import StudentInfo
from ...common.images.beton import Beton
from ...common.run import versions
from ...common.timing import median_ms
from .agreement import hold
from .boxes import Boxes, agreement_of_boxes
from .config import ExportConfig
from .exported_file import ExportedFile, size_of
from .graph import in_a_sentence, quiet
from .input_form import prepare
from .onnx_file import open_session, save_onnx
from .subject import Subject

RUNTIME = "onnxruntime"
MOST_PICTURES = 50
"""At most so many are compared: a detector takes a second for one."""
NEWEST_OPSET = 20
"""Of torch's older exporter."""
OUTPUTS = {
    "boxes": ("float32", ["boxes", 4]),
    "labels": ("int64", ["boxes"]),
    "scores": ("float32", ["boxes"]),
    "masks": ("float32", ["boxes", "height", "width"]),
}
"""Their types and shapes. A box is left, top, right, bottom in pixels of the picture; labels count the classes from 1; scores
fall; a mask, of Mask R-CNN alone, is the probability of each pixel."""


class DetectorWithInput(nn.Module):
    """A detector behind its input: ``image`` in a form of ``input_form``, but of any height and width and one alone, (1, H, W, 3)
    or (1, 3, H, W), to ``OUTPUTS``. ``side`` is what the shorter side is scaled to, inside. The detector is changed."""

    mean: Tensor
    std: Tensor

    def __init__(self, detector: FasterRCNN, form: str, info: StudentInfo, side: int | None) -> None:
        super().__init__()
        self.detector, self.form = detector, form
        self.outputs = [name for name in OUTPUTS if name != "masks" or isinstance(detector, MaskRCNN)]
        self.register_buffer("mean", torch.tensor(info.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(3, 1, 1))
        scaling: Any = detector.transform
        if side is not None:
            scaling.min_size, scaling.max_size = (side,), side * 5 // 3  # as build_detector has them
        if form == "normalised":
            scaling.image_mean, scaling.image_std = [0.0] * 3, [1.0] * 3
        self.side = int(scaling.min_size[-1])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.form == "uint8":
            image = image.permute(0, 3, 1, 2).float() / 255
        (found,) = self.detector([image[0]])
        return tuple(found[name][:, 0] if name == "masks" else found[name] for name in self.outputs)

    def prepare(self, picture: Tensor) -> Tensor:
        """(H, W, 3) uint8 as ``forward`` takes it."""
        return prepare(picture[None], self.form, self.mean, self.std)

    def named(self, outputs: Sequence[Any]) -> Boxes:
        return Boxes(**{name: torch.as_tensor(value) for name, value in zip(self.outputs, outputs, strict=True)})


@dataclass(frozen=True)
class Pictures:
    """Those that a detector's file is compared on, each (H, W, 3) uint8, what torch finds in each, and where they are from."""

    pixels: tuple[Tensor, ...]
    torchs: tuple[Boxes, ...]
    source: str


def check_for_detector(config: ExportConfig) -> None:
    """MisuseError: what a detector's export does not do."""
    other = next((name for name in config.to if name != "onnx"), None)
    if other:
        raise MisuseError(
            f"`to` {other}: a detector becomes onnx alone, since torch.export does not follow torchvision's choice of boxes"
        )
    if config.int8:
        raise MisuseError("`int8`: a detector is written in float32 alone; leave `int8` out")
    if config.opset > NEWEST_OPSET:
        raise MisuseError(
            f"`opset` {config.opset}: a detector is written by torch's older exporter, which knows {NEWEST_OPSET} at most"
        )
    if config.data is None:
        raise MisuseError(
            "a detector's file is checked on what it finds: give `data`, pictures of such objects, packed by rob pack"
        )


@torch.no_grad()
def open_pictures(config: ExportConfig, network: DetectorWithInput) -> Pictures:
    """Some of ``data``, the same for every detector, every second one without its lower third, so that there are several sizes;
    and one in which there is nothing to be found, if torch finds nothing there: else its boxes tie, and which are kept is chance.

    MisuseError: ``data`` cannot be read. FailureError: torch finds nothing, and there is nothing to compare.
    """
    assert config.data is not None
    data = Beton(config.data)
    order = torch.randperm(data.num_images, generator=torch.Generator().manual_seed(0))
    chosen = order[: min(config.images, MOST_PICTURES)].tolist()
    whole = [torch.from_numpy(data.image(number)) for number in chosen]
    pictures = [picture[: 2 * len(picture) // 3 or 1] if row % 2 else picture for row, picture in enumerate(whole)]
    plain = torch.full((network.side, network.side, 3), 128, dtype=torch.uint8)
    *found, last = (network.named(network(network.prepare(picture))) for picture in (*pictures, plain))
    if not any(len(boxes.scores) for boxes in found):
        raise FailureError(
            f"torch finds nothing in {len(found)} pictures of `data`, so that the file cannot be checked: give pictures of what "
            "the detector was trained on"
        )
    if not len(last.scores):
        pictures, found = [*pictures, plain], [*found, last]
    return Pictures(tuple(pictures), tuple(found), data.manifest.fingerprint)


def of_detector(subject: Subject, config: ExportConfig) -> Callable[[str, str, Path], ExportedFile]:
    """What writes and checks the file. FailureError: torch finds nothing in ``data``, and there is nothing to compare."""
    assert isinstance(subject.network, FasterRCNN)
    network = DetectorWithInput(subject.network, config.input_form, subject.info, config.size).eval()
    pictures = open_pictures(config, network)
    torchs = pictures.torchs

    def write(name: str, precision: str, path: Path) -> ExportedFile:
        facts = subject.facts(config.input_form, {"side": network.side, "first_label": 1})
        busiest = pictures.pixels[max(range(len(torchs)), key=lambda number: len(torchs[number].scores))]
        # Wide: of a square one of the size that a ViT was made for, its positions would be taken as they are for all sizes.
        example = busiest[: max(1, 2 * busiest.shape[1] // 3)]
        with in_a_sentence(subject.info.name, path.name, RUNTIME):
            write_detector(network, example, subject.info.name, config.opset, facts, path)
            run = load_detector(path)
            images = [network.prepare(picture).numpy() for picture in pictures.pixels]
            found = agreement_of_boxes([network.named(run(image)) for image in images], torchs)
        hold(found, False, config.min_agreement, path.name)
        uint8 = config.input_form == "uint8"
        return ExportedFile(
            file=path.name,
            format=name,
            precision=precision,
            bytes=size_of(path),
            student=subject.info.name,
            weights=subject.weights,
            input={
                "name": "image",
                "form": config.input_form,
                "dtype": "uint8" if uint8 else "float32",
                "shape": [1, "height", "width", 3] if uint8 else [1, 3, "height", "width"],
                "mean": list(subject.info.mean),
                "std": list(subject.info.std),
            },
            output={
                "name": ", ".join(network.outputs),
                "dtype": [OUTPUTS[name][0] for name in network.outputs],
                "shape": [OUTPUTS[name][1] for name in network.outputs],
                "classes": list(subject.classes or ()),
            },
            runtime=f"{RUNTIME} {versions(RUNTIME)[RUNTIME]}",
            agreement=None,
            checked_on=pictures.source,
            latency_ms=round(median_ms(lambda: run(images[0])), 3),
            int8_share=None,
            calibration_images=None,
            versions=versions("rob", "torch", "torchvision", RUNTIME),
            boxes=found,
        )

    return write


# ==== written and run ====


def write_detector(
    network: DetectorWithInput, example: Tensor, name: str, opset: int, facts: Mapping[str, str], path: Path
) -> None:
    """``example``: a picture in which something is found. FailureError: the opset lacks an operator of the network."""
    import onnx

    height, width = (1, 2) if network.form == "uint8" else (2, 3)
    found = {out: {0: "found"} | ({1: "rows", 2: "columns"} if out == "masks" else {}) for out in network.outputs}
    with quiet():
        torch.onnx.register_custom_op_symbolic("aten::_upsample_bicubic2d_aa", _resize_positions, 18)
        try:
            torch.onnx.export(
                network,
                (network.prepare(example),),
                path,
                dynamo=False,
                input_names=["image"],
                output_names=network.outputs,
                dynamic_axes={"image": {height: "height", width: "width"}, **found},
                opset_version=opset,
            )
        except Exception as error:  # the exporter has errors of its own, about this and that
            raise FailureError(f"{name} does not become ONNX of `opset` {opset}: {first_line(error)}") from error
    save_onnx(onnx.load(path), facts, path)


def _resize_positions(graph: Any, image: Any, size: Any, *_: Any) -> Any:
    """ONNX of torch's antialiased bicubic resampling, which torch's older exporter lacks: of a ViT's position embedding."""
    from torch.onnx import symbolic_helper

    if symbolic_helper._is_packed_list(size):
        one = graph.op("Constant", value_t=torch.tensor([0]))
        size = graph.op(
            "Concat", *(graph.op("Unsqueeze", n, one) for n in symbolic_helper._unpack_list(size)), axis_i=0
        )
    size = graph.op("Cast", size, to_i=torch.onnx.TensorProtoDataType.INT64)
    channels = graph.op(
        "Slice", graph.op("Shape", image), *(graph.op("Constant", value_t=torch.tensor([n])) for n in (0, 2))
    )
    absent = symbolic_helper._optional_input_placeholder_tensor(graph)
    return graph.op(
        "Resize",
        image,
        absent,
        absent,
        graph.op("Concat", channels, size, axis_i=0),
        mode_s="cubic",
        antialias_i=1,
        cubic_coeff_a_f=-0.5,  # torch's with antialiasing, -0.75 without
        exclude_outside_i=1,
        coordinate_transformation_mode_s="half_pixel",
    )


def load_detector(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """On one thread of the CPU."""
    session = open_session(str(path), threads=1)
    return lambda image: session.run(None, {"image": image})
