"""Objectives: what the student's features have to match. One small file each; a new paper is a new file here.

An objective owns the student's head, and whatever it gathers from step to step (a queue, a running centre). It is a module
``(features (B, V, F), target of G views, pair_weights (V, G)) -> scalar loss`` and does not know who made the target: a
store, a teacher, or a momentum copy of the student, which shares its ``embed`` and ``prototypes``.
"""

from dataclasses import dataclass

from torch import nn

from ...common.errors import MisuseError, unknown_name
from ..branches import TargetSpace
from .centre import CENTRES, SINKHORNS
from .dino import DinoObjective
from .disco import DiscoObjective
from .embedding import EmbeddingObjective
from .ibot import IbotObjective
from .moco import MocoObjective
from .msn import MsnObjective
from .prototypes import HEADS, PrototypeObjective
from .swav import SwavObjective

OBJECTIVES: dict[str, type[EmbeddingObjective] | type[PrototypeObjective]] = {
    "embedding": EmbeddingObjective,
    "disco": DiscoObjective,
    "moco": MocoObjective,
    "dino": DinoObjective,
    "ibot": IbotObjective,
    "swav": SwavObjective,
    "msn": MsnObjective,
}
OPTIONS: frozenset[str] = frozenset().union(*(objective.options for objective in OBJECTIVES.values()))
"""Fields of ``ObjectiveConfig`` that some objectives read and others do not."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is None is as the objective's paper has it; an option that the objective does not read is refused.

    student_temp, teacher_temp: of the softmaxes; the teacher's is by default its own. MoCo and DisCo have the first alone.
    centre: "none", "checkpoint", "calibration" or "running", see ``centre``; with embeddings "calibration" takes off the
        teacher's mean embedding. sinkhorn: "none", "batch" or "queue", in the centre's place. queue: rows of a queue.
    mean_entropy: weight of MSN's term. head: "fresh" prototypes, the "teacher"'s to start from (for dino and ibot the default
        where they are known), or those kept "frozen".
    hidden_dim: width of the student's head; bottleneck: of what comes out of it, before fresh prototypes (elsewhere it is the
        teacher's). head_norm: the head's BatchNorm. norm_last_layer: False lets the lengths of
        DINO's prototypes be learned, as its ViTs have them; else they stay as they start, at 1 or the teacher's.
    only_consistency, consistency_weight: DisCo's.
    loss_impl: how the prototype loss is computed (``kernels.prototype_ce``), which changes speed and memory only.
    """

    name: str = "embedding"
    student_temp: float | None = None
    teacher_temp: float | None = None
    centre: str | None = None
    sinkhorn: str | None = None
    queue: int | None = None
    mean_entropy: float | None = None
    head: str | None = None
    hidden_dim: int = 2048
    head_norm: bool | None = None
    bottleneck: int | None = None
    norm_last_layer: bool | None = None
    only_consistency: bool | None = None
    consistency_weight: float | None = None
    loss_impl: str = "auto"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise unknown_name("objective", self.name, OBJECTIVES)
        known = {"centre": ("centre", CENTRES), "sinkhorn": ("Sinkhorn", SINKHORNS), "head": ("head", HEADS)}
        for field, (kind, names) in known.items():
            value = getattr(self, field)
            if value is not None and value not in names:
                raise unknown_name(kind, value, names)
        for field in OPTIONS - OBJECTIVES[self.name].options:
            if getattr(self, field) is not None:
                readers = ", ".join(name for name, objective in OBJECTIVES.items() if field in objective.options)
                option = "--centre-targets" if field == "centre" else f"--{field.replace('_', '-')}"
                raise MisuseError(f"{option} means nothing to --objective {self.name}: it is for {readers}")
        for field in ("student_temp", "teacher_temp", "queue"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise MisuseError(f"--{field.replace('_', '-')} is {value}, expected more than 0")


def usual_objective(space: TargetSpace) -> str:
    """What did best in benchmarks/ablation.py with such targets, by name."""
    return "dino" if space.num_prototypes else "embedding"


def build_objective(
    config: ObjectiveConfig, num_features: int, space: TargetSpace, targets: int = 2, num_images: int | None = None
) -> nn.Module:
    """The objective with its head for a student of ``num_features``, for steps of ``targets`` views of each image.

    ``num_images``, where known, keeps a queue short enough for the data set. MisuseError: the targets cannot serve it.
    """
    return OBJECTIVES[config.name](config, num_features, space, targets, num_images)
