"""The rows of the ablation: what of the objective, the pairing, the head and the targets each one varies."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rob.common.views.recipes import Recipe
from rob.student_train.config import ObjectiveConfig, OptimiserConfig, PairingConfig
from rob.student_train.objectives import OBJECTIVES
from rob.student_train.objectives.prototypes import PrototypeObjective
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.config import TargetsConfig
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.with_copy import WithCopy

STUDENTS = {"cnn": "test_resnet", "vit": "test_vit2"}
"""0.37 and 0.34 million parameters in their small-image forms."""
ADAMW = {"cnn": OptimiserConfig(lr=3e-3), "vit": OptimiserConfig(lr=4e-3)}
"""What a kind of student learns fastest with in few steps."""
LARS = OptimiserConfig("lars", lr=2.4, weight_decay=1e-5)
"""A CNN's without a teacher (``benchmarks/momentum.py``)."""
COPY_MOMENTUM = 0.99
"""Short runs want a faster copy than the papers' .999."""
GLOBALS = 2


def kind_of(student: str) -> str:
    return "vit" if "vit" in student else "cnn"


@dataclass(frozen=True)
class Row:
    """``objective`` None: random weights. ``kind``: of targets, cached, copy (a teacher's with a copy beside them) or momentum.

    ``meets`` and ``targets_a_step`` are the pairing's; ``replays``: global crops are the targets' own under ``cross`` too.
    ``locals_as_globals``: the method has no local crops, and the student sees global ones of as many pixels instead.
    ``besides``: what networks other than the student pass in a step.
    """

    name: str
    title: str
    objective: str | None
    meets: str = "same"
    options: dict[str, Any] = field(default_factory=dict)
    targets_a_step: int = GLOBALS
    replays: bool = False
    locals_as_globals: bool = False
    kind: str = "cached"
    besides: str = ""

    def fitted_objective(self, kind: str, teacher_temp: float | None) -> ObjectiveConfig:
        """For a student of ``kind``: heads over prototypes have BatchNorm for a CNN and none for a ViT, as RoB's."""
        assert self.objective is not None
        options = dict(self.options)
        if issubclass(OBJECTIVES[self.objective], PrototypeObjective):
            options = {"head_norm": kind == "cnn", "teacher_temp": teacher_temp} | options
        return ObjectiveConfig(self.objective, **options)

    def pairing(self, num_local: int, image_size: int, local_size: int) -> PairingConfig:
        fresh = self.meets == "cross" and not self.replays
        if self.locals_as_globals:
            more = num_local * local_size**2 // image_size**2
            return PairingConfig(self.meets, GLOBALS + more, 0, fresh=fresh)
        more_globals = GLOBALS if self.targets_a_step < GLOBALS else None
        return PairingConfig(self.meets, self.targets_a_step, num_local, fresh=fresh, step_globals=more_globals)

    def targets(self, store: Path, recipe: Recipe, num_prototypes: int) -> TargetsConfig:
        if self.kind == "momentum":
            return Momentum(recipe, num_prototypes)
        cached = Cached(store, cache_in_memory=True)
        return WithCopy(cached, copy_momentum=COPY_MOMENTUM) if self.kind == "copy" else cached

    def optimiser(self, kind: str) -> OptimiserConfig:
        return LARS if self.kind == "momentum" and kind == "cnn" else replace(ADAMW[kind])

    def seen(self, num_local: int) -> str:
        """The student's crops of an image in a step, for the table."""
        if self.objective is None:
            return "-"
        if self.locals_as_globals:
            return f"{self.pairing(num_local, 2, 1).num_global} + 0"
        return f"{GLOBALS} + {num_local}"


FRESH, MLP = {"head": "fresh"}, {"head": "fresh", "head_type": "mlp"}
CODES = {"sinkhorn": "batch"}
"""RoB's on SwAV: the batch's codes, without a queue."""
OWN_MSN = {"sinkhorn": "batch", "mean_entropy": 1.0}
PLAIN = {"sinkhorn": "none", "mean_entropy": 0.0}
"""RoB's on MSN: a softmax."""

_rows = (
    Row("dino-same", "RoB on DINO, same, head fresh", "dino", options=FRESH),
    Row("dino-cross", "DINO, cross with fresh crops, head fresh", "dino", "cross", FRESH),
    Row("embedding-same", "embedding, same", "embedding"),
    Row("no-teacher", "SwAV without a teacher", "swav", "cross", {"teacher_temp": 0.01, **CODES}, replays=True, kind="momentum"),
    Row("random", "random weights", None),
    Row("dino-same-teacher", "RoB on DINO, same, head teacher's", "dino", options={"head": "teacher"}),
    Row("dino-cross-teacher", "DINO, cross with fresh crops, head teacher's", "dino", "cross", {"head": "teacher"}),
    Row("dino-same-mlp", "RoB on DINO, same, head mlp", "dino", options=MLP),
    Row(
        "swav-same-frozen", "RoB on SwAV, same, mlp to the teacher's prototypes", "swav",
        options={"head": "frozen", "head_type": "mlp", **CODES}, targets_a_step=1,
    ),
    Row("swav-same", "RoB on SwAV, same, head fresh", "swav", options=FRESH | CODES, targets_a_step=1),
    Row("msn-same-mlp", "RoB on MSN, same, head mlp", "msn", options=MLP | PLAIN),
    Row("msn-same", "RoB on MSN, same, head fresh", "msn", options=FRESH | PLAIN),
    Row("dino-replay", "DINO, cross with the cached crops, head fresh", "dino", "cross", FRESH, replays=True),
    Row("seed", "SEED", "seed", targets_a_step=1),
    Row("simreg", "SimReg", "simreg", targets_a_step=1),
    Row(
        "disco", "DisCo, keys of a copy", "disco", locals_as_globals=True, kind="copy",
        besides="a copy's passes over all global crops",
    ),
    Row(
        "disco-consistency", "DisCo, consistency alone", "disco", options={"only_consistency": True}, locals_as_globals=True,
    ),
    Row("embedding-cross", "embedding, cross with fresh crops", "embedding", "cross"),
    Row("msn-own", "MSN's own form, cross with fresh crops", "msn", "cross", FRESH | OWN_MSN, targets_a_step=1),
    Row("swav-own", "SwAV's own form, cross with fresh crops", "swav", "cross", FRESH | {"sinkhorn": "queue"}),
    Row(
        "dino-replay-teacher", "DINO, cross with the cached crops, head teacher's", "dino", "cross", {"head": "teacher"},
        replays=True,
    ),
    Row("swav-same-mlp", "RoB on SwAV, same, head mlp", "swav", options=MLP | CODES, targets_a_step=1),
    Row("msn-same-teacher", "RoB on MSN, same, head teacher's", "msn", options={"head": "teacher"} | PLAIN),
)  # fmt: skip
ROWS: dict[str, Row] = {row.name: row for row in _rows}
"""In the order of their weight: what a short time is spent on first."""
