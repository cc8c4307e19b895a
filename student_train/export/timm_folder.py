"""A folder that timm's ``local-dir:`` and the Hub understand: ``config.json`` and ``model.safetensors``."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import save_config_for_hf

from ...common.errors import MisuseError
from ...common.factories import is_factory
from ...common.files import replacing
from ...common.records import sealed
from ...common.weights import tensor_file
from ..evaluate.network import share_seen
from ..students import VIT_FAMILIES, StudentInfo, model_family
from .graph import Graph, Runner, quiet, run_module


def is_for_timm(info: StudentInfo) -> bool:
    """Whether timm alone builds the network: it has no argument for the strides of a small-image CNN, nor for a ViT's
    convolutions."""
    of_timm = not info.small_images or (model_family(info.name) in VIT_FAMILIES and not info.conv_stem)
    return not info.is_own and of_timm


def lines_without_timm(weights: str, info: StudentInfo) -> str:
    """What builds a network that timm cannot, in two lines."""
    student = f', student="{info.name}"' if is_factory(info.name) else ""
    return f'import rob\nbackbone, info = rob.load_student("{weights}"{student})'


def check_for_timm(info: StudentInfo, weights: Path, task: str | None = None) -> None:
    """MisuseError: a segmenter, or a small-image CNN, with the two lines that work."""
    if task == "segment":
        raise MisuseError(f"`to` timm: timm has no segmenters, and {weights} holds one: take onnx, or rob.load_tuned")
    if not is_for_timm(info):
        lines = f'rob.load_tuned("{weights}")'
        if task is None:
            lines = lines_without_timm(str(weights), info).replace("\n", "; ")
        if info.is_own:
            raise MisuseError(
                f"`to` timm: {info.name} is not timm's, which cannot build it. These two lines load it: {lines}"
            )
        raise MisuseError(
            f"`to` timm: {info.name} has the small-image form, whose strides or convolutions timm cannot express: it would "
            f"compute something else, or refuse the weights. These two lines load it: {lines}"
        )


def write_timm(graph: Graph, folder: Path) -> None:
    """As timm's ``save_for_hf``, with a checksum in each file, which timm passes over."""
    folder.mkdir()
    backbone, info, size = graph.network.backbone, graph.info, graph.network.size
    data: dict[str, Any] = {"input_size": (3, size, size), "mean": info.mean, "std": info.std}
    data |= {"interpolation": "bicubic", "crop_pct": share_seen(size)}
    arguments = dict(info.timm_kwargs) | ({"img_size": size} if "img_size" in info.timm_kwargs else {})
    scratch = folder / "config.json"
    names = {} if graph.classes is None else {"label_names": list(graph.classes)}
    save_config_for_hf(backbone, str(scratch), names, arguments, data)
    config = json.loads(scratch.read_bytes())
    scratch.unlink()
    for stale in ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes"):
        config["pretrained_cfg"].pop(stale, None)  # of the weights that timm publishes under the same name
    with replacing(scratch) as file:
        file.write(sealed(config, indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    with replacing(folder / "model.safetensors") as file:
        file.write(tensor_file(tensors, {"format": "pt", **graph.facts}))


def load_timm(folder: Path) -> Runner:
    """By timm alone."""
    with quiet():
        return run_module(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
