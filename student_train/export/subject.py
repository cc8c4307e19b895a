"""What is exported: a student, whose features come out, or a network for a task: logits, or a detector's boxes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ...common.exported import StudentInfo
from ...common.run import versions
from ...common.weights import hash_weights
from ..checkpoint import load_student
from ..evaluate.network import share_seen
from ..finetune.segmenter import Segmenter
from ..finetune.tuned import load_tuned, tuned_path
from ..students import check_input_size, create_student
from .onnx_file import FACTS


@dataclass(frozen=True)
class Subject:
    """``network`` is in eval mode, for images of ``info.image_size`` alone, but a detector. ``info`` builds a student or a
    classifier; of a segmenter and a detector it is the student inside."""

    network: nn.Module
    info: StudentInfo
    stem: str
    """Of the files' names."""
    weights: str
    """What ``hash_weights`` says of them."""
    task: str | None
    classes: tuple[str, ...] | None
    told: Mapping[str, str]
    """What a file says of the network, as our own weights files do."""

    @property
    def output(self) -> str:
        """The name of what comes out."""
        return "features" if self.task is None else "logits"

    @property
    def crop(self) -> float | None:
        """Of a picture's shorter side, the middle part that becomes the input; None: the whole picture does, squeezed, as a
        segmenter sees it in training."""
        return None if self.task == "segment" else share_seen(self.info.image_size)

    def facts(self, form: str, seen: Mapping[str, object] | None = None) -> dict[str, str]:
        """What a file says of itself; ``form`` is that of its input, ``seen`` says what it sees of a picture, where that is not
        ``crop``."""
        info = self.info
        if seen is None:
            seen = {"size": info.image_size, "crop": self.crop}
        facts = {"input": form, **seen, "mean": info.mean, "std": info.std, "student": info.name}
        tuned = {"task": self.task, "classes": self.classes} if self.task else {}
        return {FACTS: json.dumps({**facts, **tuned, "weights": self.weights, **versions("rob")}), **self.told}


def open_subject(run: Path, size: int | None) -> Subject:
    """MisuseError: nothing there that can be exported, or a size that it cannot take."""
    path = tuned_path(run)
    if path is None:
        network, info = load_student(run)
        task, classes, told = None, None, {}
    else:
        network, tuned = load_tuned(path)
        info, task, classes = tuned.info, tuned.task, tuned.classes
        told = {"tuned": json.dumps(asdict(tuned), sort_keys=True)}
    weights = hash_weights(network.state_dict())
    info = replace(info, image_size=size or info.image_size)
    told = told or {"student": json.dumps(info.to_dict())}
    if task == "classify" and classes is not None and not info.is_own:
        info = replace(info, timm_kwargs={**info.timm_kwargs, "num_classes": len(classes)})
    if task != "detect":  # which scales pictures itself
        check_input_size(network, info.image_size)
        network = for_one_size(network, info)
    named = path or run
    stem = "student" if named.is_dir() else named.stem
    return Subject(network, info, stem, weights, task, classes, told)


def for_one_size(network: nn.Module, info: StudentInfo) -> nn.Module:
    """The same network for images of ``info.image_size`` alone: a ViT's position embedding is brought to it here, not on the
    device. In the memory layout that exporters expect."""
    if isinstance(network, Segmenter):
        network.body.backbone = for_one_size(network.body.backbone, info)
    elif info.timm_kwargs.get("dynamic_img_size"):
        network.set_input_size(img_size=info.image_size)  # type: ignore[operator]
        tensors = network.state_dict()
        fixed = {**info.timm_kwargs, "img_size": info.image_size, "dynamic_img_size": False}
        network = create_student(replace(info, timm_kwargs=fixed)).eval()
        network.load_state_dict(tensors)
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
