"""Weights of a network for a task: a student with a head, its classes, and how to build it anew."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common.errors import MisuseError
from ...common.exported import StudentInfo, read_metadata
from ...common.files import replacing
from ...common.records import DamagedError, parsed, typed
from ...common.run import versions
from ...common.weights import read_tensor_file, tensor_file
from ..checkpoint import WEIGHTS_NAME, apart
from ..evaluate.detection.model import build_detector
from ..own_student import OwnClassifier, create_own
from ..students import create_student
from .segmenter import Segmenter

AGAIN = "copy it again, or fine-tune again"


@dataclass(frozen=True)
class Tuned:
    """What a file says of its network. ``student.image_size`` is the side that it was fine-tuned at."""

    task: str
    """One of ``TASKS``."""
    student: dict[str, Any]
    classes: tuple[str, ...]
    """In the order of the outputs; a detector's labels count from 1."""
    settings: dict[str, int | bool]
    """Of the head."""

    @property
    def info(self) -> StudentInfo:
        return StudentInfo.from_dict(self.student)

    def build(self, info: StudentInfo | None = None) -> nn.Module:
        """The network with random weights; ``info``: of another form than the file's."""
        return TASKS[self.task].build(info or self.info, len(self.classes), self.settings)


@dataclass(frozen=True)
class Task:
    """``build`` is given the student, the number of classes, and the settings of the head."""

    file: str
    build: Callable[[StudentInfo, int, Mapping[str, Any]], nn.Module]


def build_classifier(info: StudentInfo, num_classes: int, settings: Mapping[str, Any]) -> nn.Module:
    """timm's own model with its classifier: images (N, 3, S, S) to logits (N, C); another network with a linear one."""
    if info.is_own:
        return OwnClassifier(create_own(info), num_classes)
    return create_student(replace(info, timm_kwargs={**info.timm_kwargs, "num_classes": num_classes}))


TASKS = {
    "classify": Task("classifier.safetensors", build_classifier),
    "segment": Task(
        "segmenter.safetensors", lambda info, n, head: Segmenter(create_student(info), n, head["channels"])
    ),
    "detect": Task("detector.safetensors", lambda info, n, head: build_detector(create_student(info), info, n, **head)),
}


def save_tuned(model: nn.Module, tuned: Tuned, path: Path) -> None:
    """FailureError: it cannot be written, and the earlier file is kept."""
    tensors = apart(model.state_dict())
    metadata = {
        "format": "pt",
        "tuned": json.dumps(asdict(tuned), sort_keys=True),
        "rob_version": versions("rob")["rob"],
    }
    with replacing(path) as file:
        file.write(tensor_file(tensors, metadata))


def tuned_path(run_or_weights: Path) -> Path | None:
    """The weights of a task there; None: there are none, or a student's beside them."""
    if (run_or_weights / WEIGHTS_NAME).exists():
        return None
    if run_or_weights.is_dir():
        there = [run_or_weights / task.file for task in TASKS.values()]
        return next((path for path in there if path.exists()), None)
    return run_or_weights if "tuned" in read_metadata(run_or_weights) else None


def load_tuned(run_or_weights: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, Tuned]:
    """The classifier, segmenter or detector of ``rob finetune`` or ``rob eval detect``, in eval mode, and its description.

    A classifier maps (N, 3, S, S), normalised by ``info.mean`` and ``info.std``, to logits (N, C); a segmenter to (N, C, S, S); a
    detector is torchvision's. MisuseError: there is none, or it is damaged.
    """
    path = tuned_path(Path(run_or_weights))
    if path is None:
        raise MisuseError(f"{run_or_weights} holds no classifier, segmenter or detector: give OUT of rob finetune")
    try:
        tensors, metadata = read_tensor_file(path)
        tuned: Tuned = typed(Tuned, parsed(metadata["tuned"].encode()))
        model = tuned.build()
        model.load_state_dict(tensors)
    except DamagedError as problem:
        raise MisuseError(f"{path} {problem}: {AGAIN}") from None
    except OSError as error:
        raise MisuseError(f"{path} cannot be read ({error.strerror}): {AGAIN}") from None
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise MisuseError(f"{path} does not hold the network that it describes: {AGAIN}") from error
    return model.to(device).eval(), tuned
