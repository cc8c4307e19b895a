"""Objectives: what the student's features have to match. One small file each; a new paper is a new file here.

An objective owns the student's head. It is a module ``(features (B, V, F), target, pair_weights (V, G)) -> scalar loss``.
"""

from dataclasses import dataclass

from torch import nn

from ...common.errors import unknown_name
from ..branches import TargetSpace
from .dino import DinoObjective
from .embedding import EmbeddingObjective

OBJECTIVES: dict[str, type[nn.Module]] = {"dino": DinoObjective, "embedding": EmbeddingObjective}


@dataclass(frozen=True)
class ObjectiveConfig:
    """``teacher_temp`` None takes the teacher's own; ``centre`` subtracts the teacher's mean over the data set.

    ``hidden_dim`` and ``bottleneck`` are widths of the student's head, ``head_norm`` gives it BatchNorm; ``loss_impl`` picks
    how the prototype loss is computed (``kernels.prototype_ce``), which changes speed and memory only.
    """

    name: str = "embedding"
    student_temp: float = 0.1
    teacher_temp: float | None = None
    centre: bool = False
    hidden_dim: int = 2048
    head_norm: bool = True
    bottleneck: int = 256
    loss_impl: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise unknown_name("objective", self.name, OBJECTIVES)


def build_objective(config: ObjectiveConfig, num_features: int, space: TargetSpace) -> nn.Module:
    """The objective with a fresh head for a student of ``num_features``. Raises MisuseError when the target cannot serve it."""
    return OBJECTIVES[config.name](config, num_features, space)
