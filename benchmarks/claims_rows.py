"""The rows of ``claims.py``: what of objective, pairing, head, targets, views and encoding each one varies."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rob.common.errors import unknown_name
from rob.common.store.encodings import Encoding
from rob.student_train.config import ObjectiveConfig, OptimiserConfig, PairingConfig
from rob.student_train.objectives import OBJECTIVES
from rob.student_train.objectives.prototypes import PrototypeObjective

STUDENTS = {"cnn": "test_resnet", "vit": "test_vit2"}
"""0.37 and 0.34 million parameters in their small-image forms."""
ADAMW = {"cnn": OptimiserConfig(lr=3e-3), "vit": OptimiserConfig(lr=4e-3)}
"""What a kind of student learns fastest with in few steps."""
LARS = OptimiserConfig("lars", weight_decay=1e-5)
LARS_RATES = {"swav": 2.4, "moco": 1.6, "dino": 4.0}
"""A CNN's without a teacher (``benchmarks/momentum.py``)."""
COPY_MOMENTUM = 0.99
"""Short runs want a faster copy than the papers' .999."""
GLOBALS = 2
FLOAT16 = Encoding("embedding")
USES_STORE = ("cached", "copy")


def kind_of(student: str) -> str:
    return "vit" if "vit" in student else "cnn"


@dataclass(frozen=True)
class Row:
    """``objective`` None: random weights. ``kind``: where targets come from: cached, copy (a teacher's with a copy beside them),
    momentum, online (the live teacher, new views in every epoch), labels, tuned (the live teacher, fine-tuned with labels).

    ``against``: the row whose test images it is compared on, one by one. ``meets`` and ``targets_a_step`` are the pairing's;
    ``replays``: global crops are the targets' own under ``cross`` too. ``locals_as_globals``: the method has no local crops, and
    the student sees global ones of as many pixels instead; ``one_crop``: one global crop a step, in as many times the epochs.
    ``besides``: what networks other than the student pass in a step. ``views``, ``recipe``: None is the benchmark's.
    """

    name: str
    title: str
    objective: str | None
    meets: str = "same"
    options: dict[str, Any] = field(default_factory=dict)
    targets_a_step: int = GLOBALS
    replays: bool = False
    locals_as_globals: bool = False
    one_crop: bool = False
    kind: str = "cached"
    besides: str = ""
    against: str = ""
    views: int | None = None
    encoding: Encoding = FLOAT16
    recipe: str | None = None

    @property
    def has_copy(self) -> bool:
        """Whether there is a slow copy of the student, which is its average."""
        return self.kind == "copy" or (self.kind == "momentum" and self.objective != "swav")

    def fitted_objective(self, kind: str, teacher_temp: float | None) -> ObjectiveConfig:
        """For a student of ``kind``: heads over prototypes have BatchNorm for a CNN and none for a ViT, as by default."""
        assert self.objective is not None
        options = dict(self.options)
        if issubclass(OBJECTIVES[self.objective], PrototypeObjective):
            options = {"head_norm": kind == "cnn", "teacher_temp": teacher_temp} | options
        return ObjectiveConfig(self.objective, **options)

    def pairing(self, num_local: int, image_size: int, local_size: int) -> PairingConfig:
        fresh = self.meets == "cross" and not self.replays
        if self.one_crop:
            return PairingConfig(self.meets, 1, 0, fresh=fresh)
        if self.locals_as_globals:
            more = num_local * local_size**2 // image_size**2
            return PairingConfig(self.meets, GLOBALS + more, 0, fresh=fresh)
        more_globals = GLOBALS if self.targets_a_step < GLOBALS else None
        return PairingConfig(self.meets, self.targets_a_step, num_local, fresh=fresh, step_globals=more_globals)

    def epochs(self, epochs: int, num_local: int, image_size: int, local_size: int) -> int:
        """So many that the student sees as many pixels as in ``epochs`` of the other rows."""
        return epochs * (GLOBALS + num_local * local_size**2 // image_size**2) if self.one_crop else epochs

    def optimiser(self, kind: str) -> OptimiserConfig:
        if self.kind == "momentum" and kind == "cnn":
            return replace(LARS, lr=LARS_RATES[str(self.objective)])
        return ADAMW[kind]

    def seen(self, num_local: int) -> str:
        """The student's crops of an image in a step, for the table."""
        if self.objective is None:
            return "-"
        if self.one_crop or self.locals_as_globals:
            return f"{self.pairing(num_local, 2, 1).num_global} + 0"
        return f"{GLOBALS} + {num_local}"


FRESH, MLP = {"head": "fresh"}, {"head": "fresh", "head_type": "mlp"}
LENGTHS = FRESH | {"norm_last_layer": False}
"""RoB's on DINO and SwAV: the prototypes' lengths are learned."""
CODES = {"sinkhorn": "batch"}
"""RoB's on SwAV: the batch's codes, without a queue."""
OWN_MSN = {"sinkhorn": "batch", "mean_entropy": 1.0}
PLAIN = {"sinkhorn": "none", "mean_entropy": 0.0, "teacher_temp": 0.025}
"""RoB's on MSN: a softmax. At the temperature of the other rows it would be RoB on DINO, to the last digit."""

LABELS = {"head": "fresh", "head_type": "mlp", "student_temp": 1.0, "teacher_temp": 1.0}
"""Cross-entropy over classes."""
WITHOUT_TEACHER: dict[str, dict[str, Any]] = {
    "swav": {"teacher_temp": 0.01, **CODES},
    "moco": {},
    "dino": {"teacher_temp": 0.02},
}
"""Without a teacher, for short runs (``benchmarks/momentum.py``)."""
OF_TEACHER = "the teacher's passes over a step's targets"


def _without(method: str, recipe: str, title: str) -> Row:
    besides = "" if method == "swav" else "a copy's passes over both global crops"
    return Row(
        f"{method}-{recipe}", f"{title} without a teacher, views of {recipe}", method, "cross", WITHOUT_TEACHER[method],
        replays=True, kind="momentum", besides=besides, against="embedding", recipe=recipe,
    )  # fmt: skip


def _of_views(views: int) -> Row:
    return Row(
        f"views-{views}", f"embedding, {views} cached", "embedding", one_crop=True, views=views, against="views-live"
    )


def _topk(k: int) -> Row:
    title = f"DINO, same, head fresh, the {k} largest logits"
    return Row(f"topk-{k}", title, "dino", options=FRESH, encoding=Encoding("topk", k=k), against="dino-same")


_claims = (
    Row("random", "random weights", None, against="embedding"),
    Row("embedding", "embedding, same", "embedding"),
    _without("swav", "sslight", "SwAV"),
    Row("dino-same", "DINO, same, head fresh", "dino", options=FRESH, against="dino-cross"),
    Row("dino-cross", "DINO, cross with fresh crops, head fresh", "dino", "cross", FRESH),
    Row("supervised", "labels, from scratch", "dino", options=LABELS, kind="labels", against="embedding"),
    Row(
        "supervised-distilled", "the teacher fine-tuned with labels, live", "dino",
        options=LABELS | {"centre_targets": "checkpoint"}, kind="tuned", besides=OF_TEACHER, against="embedding",
    ),
    _without("moco", "sslight", "MoCo"),
    _without("dino", "sslight", "DINO"),
    _without("swav", "dino", "SwAV"),
    _without("moco", "dino", "MoCo"),
    _without("dino", "dino", "DINO"),
    Row("embedding-dino-views", "embedding, same, views of dino", "embedding", recipe="dino", against="embedding"),
    Row("embedding-mild-views", "embedding, same, views of mild", "embedding", recipe="mild", against="embedding"),
)  # fmt: skip
_views = (
    Row("views-live", "embedding, the live teacher", "embedding", one_crop=True, kind="online", besides=OF_TEACHER),
    *(_of_views(views) for views in (4, 1, 2, 8, 16)),
)
_encodings = (
    Row(
        "embedding-int8", "embedding, same, int8", "embedding", encoding=Encoding("embedding", "int8"), against="embedding"
    ),
    *(_topk(k) for k in (64, 16, 256)),
)  # fmt: skip
_objectives = (
    Row("dino-same-lengths", "RoB on DINO, same, head fresh, lengths learned", "dino", options=LENGTHS, against="dino-same"),
    Row("dino-same-teacher", "DINO, same, head teacher's", "dino", options={"head": "teacher"}),
    Row("dino-cross-teacher", "DINO, cross with fresh crops, head teacher's", "dino", "cross", {"head": "teacher"}),
    Row("dino-same-mlp", "DINO, same, head mlp", "dino", options=MLP),
    Row(
        "swav-same-frozen", "RoB on SwAV, same, mlp to the teacher's prototypes", "swav",
        options={"head": "frozen", "head_type": "mlp", **CODES}, targets_a_step=1,
    ),
    Row("swav-same", "RoB on SwAV, same, head fresh, lengths learned", "swav", options=LENGTHS | CODES, targets_a_step=1),
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
GROUPS = {"claims": _claims, "views": _views, "encodings": _encodings, "objectives": _objectives}
"""In the order of their weight, as the rows of each: what a short time is spent on first."""
ROWS: dict[str, Row] = {row.name: row for rows in GROUPS.values() for row in rows}


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows called ``names``, or of the groups. MisuseError: there is none."""
    rows: dict[str, Row] = {}
    for name in names:
        if name not in ROWS and name not in GROUPS:
            raise unknown_name("row", name, [*GROUPS, *ROWS])
        rows |= {row.name: row for row in GROUPS.get(name) or (ROWS[name],)}
    return list(rows.values())
