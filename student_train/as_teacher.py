"""A trained student as the next teacher: its backbone, head and prototypes in one file that ``rob cache-teacher`` takes.

``student.safetensors`` has the backbone alone, which is what downstream tasks want; objectives over prototypes want the rest.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..common.errors import MisuseError
from ..common.exported import StudentInfo
from ..common.files import refuse_existing, replacing
from ..common.run import versions
from ..common.weights import tensor_file
from .begun import read_begun
from .checkpoint import read_checkpoint
from .objectives import OBJECTIVES
from .objectives.embedding import EmbeddingObjective
from .objectives.prototypes import PrototypeObjective
from .train_config import ExportTeacherConfig


def export_teacher(config: ExportTeacherConfig) -> Path:
    """Write ``config.out``: of a run with a momentum copy the copy, of another the student.

    Tensors ``backbone.*`` by timm's names, ``head.mlp.*``, ``head.last_layer.weight`` (K, D), the effective prototypes, and
    ``centre`` and ``patch_centre`` (K,) where the run kept them; the metadata has the description of ``student.safetensors``,
    the method and the temperature of its targets. MisuseError: no checkpoint, or a head that is no teacher's;
    or ``config.out`` is there already.
    """
    refuse_existing(config.out, config.overwrite)
    payload = read_checkpoint(config.run / "checkpoint.pt")
    settings, state = payload["config"], payload["state"]
    info = StudentInfo.from_dict(settings["student_info"])
    if info.is_own:
        raise MisuseError(
            f"{config.run}: its student is {info.name}, and a teacher's file is timm's: rob cache-teacher takes a network of "
            "your own, `teacher` package.module:factory, which loads student.safetensors"
        )
    if config.image_size is not None:
        info = replace(info, image_size=config.image_size)
    method, branch = settings["objective"]["name"], settings["branch"]
    if "others" in branch:
        raise MisuseError(
            f"{config.run}: its student has a head for each of {1 + len(branch['others'])} teachers, and a teacher's file has "
            "one: take student.safetensors, the backbone, as the teacher"
        )
    kind = OBJECTIVES[method]
    student: dict[str, Tensor] = state["model"]
    teacher: dict[str, Tensor] = state.get("momentum", student)
    if settings["objective"].get("head_type") == "mlp":
        raise MisuseError(
            f"{config.run}: its head (`head_type` mlp) has logits with biases or of rows of any length, and a teacher's are of "
            "unit rows without: take student.safetensors, the backbone, as the teacher"
        )
    if issubclass(kind, EmbeddingObjective) and kind.build_head is not EmbeddingObjective.build_head:
        raise MisuseError(
            f"{config.run}: the head of `objective` {method} has layers with nothing between them, and a teacher's has an "
            "activation after each but the last: take student.safetensors, the backbone, as the teacher"
        )
    tensors = {name: t for name, t in teacher.items() if name.startswith("backbone.")}
    tensors |= {
        f"head.{name.removeprefix('objective.head.')}": t for name, t in teacher.items() if "objective.head." in name
    }
    if issubclass(kind, PrototypeObjective):
        rows = _rows(student if branch.get("own_prototypes") else teacher)
        learned = settings["objective"].get("head") != "frozen"
        unit = kind.unit_prototypes and learned and settings["objective"].get("norm_last_layer") is not False
        tensors["head.last_layer.weight"] = F.normalize(rows, dim=1) if unit else rows
        if "objective.centres.0.centre" in student:
            tensors["centre"] = student["objective.centres.0.centre"]
        if "objective.patch_centre.centre" in student:
            tensors["patch_centre"] = student["objective.patch_centre.centre"]
        activation = kind.activation
    else:
        assert issubclass(kind, EmbeddingObjective)
        activation = "relu"
    # That of a store or a teacher is in the run's settings alone: a checkpoint that goes on is not held against it.
    temperature = settings["objective"]["teacher_temp"] or branch.get("teacher_temp")
    temperature = temperature or (read_begun(config.run) or {}).get("teacher_temp")
    made: dict[str, Any] = {"method": method, "activation": activation, "teacher_temp": temperature}
    metadata = {
        "format": "pt",
        "student": json.dumps(info.to_dict(), sort_keys=True),
        "teacher": json.dumps(made, sort_keys=True),
        "rob_version": versions("rob")["rob"],
    }
    kept = {name: _stored(tensor, config.half) for name, tensor in tensors.items()}
    with replacing(config.out) as file:
        file.write(tensor_file(kept, metadata))
    return config.out


def _rows(tensors: dict[str, Tensor]) -> Tensor:
    """(K, D): what the prototypes of a checkpoint come to."""
    if "objective.prototypes.weight_v" in tensors:
        directions = F.normalize(tensors["objective.prototypes.weight_v"], dim=1)
        return tensors["objective.prototypes.weight_g"] * directions
    return tensors["objective.prototypes.weight"]


def _stored(tensor: Tensor, half: bool) -> Tensor:
    return (tensor.half() if half and tensor.is_floating_point() else tensor).contiguous()
