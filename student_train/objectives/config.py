"""Which objective, and what of its paper is changed."""

from dataclasses import dataclass

from ...common.errors import MisuseError, unknown_name

CENTRES = ("none", "checkpoint", "calibration", "running")
SINKHORNS = ("none", "batch", "queue")
HEADS = ("fresh", "teacher", "frozen")

READ: dict[str, frozenset[str]] = {}
"""By objective: the fields of ``ObjectiveConfig``, of those that not all read, that it does. ``Objective`` fills it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is None is as the objective's paper has it; an option that the objective does not read is refused.

    student_temp, teacher_temp: of the softmaxes; the teacher's is by default its own. MoCo and DisCo have the first alone.
    centre_targets: "none", "checkpoint", "calibration" or "running", see ``centre``; with embeddings "calibration" takes off
        the teacher's mean embedding. sinkhorn: "none", "batch" or "queue", in the centre's place. queue: rows of a queue.
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
    centre_targets: str | None = None
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
        if self.name not in READ:
            raise unknown_name("objective", self.name, READ)
        for kind, value, names in (
            ("centre", self.centre_targets, CENTRES),
            ("Sinkhorn", self.sinkhorn, SINKHORNS),
            ("head", self.head, HEADS),
        ):
            if value is not None and value not in names:
                raise unknown_name(kind, value, names)
        values = vars(self)
        for field in sorted(read_by_some() - READ[self.name]):
            if values[field] is not None:
                readers = ", ".join(name for name, fields in READ.items() if field in fields)
                raise MisuseError(f"`{field}` means nothing to `objective` {self.name}: it is for {readers}")
        for field in ("student_temp", "teacher_temp", "queue"):
            if values[field] is not None and not values[field] > 0:
                raise MisuseError(f"`{field}` is {values[field]}, expected more than 0")


def read_by_some() -> frozenset[str]:
    """Fields of ``ObjectiveConfig`` that some objectives read and others do not."""
    return frozenset().union(*READ.values())
