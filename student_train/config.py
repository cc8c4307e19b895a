"""What can be set of a training: its objective, the views that meet, and the optimiser."""

from dataclasses import dataclass
from typing import Annotated

from ..common.errors import MisuseError, unknown_name
from ..common.settings import Setting, check

CENTRES = ("none", "checkpoint", "calibration", "running")
SINKHORNS = ("none", "batch", "queue")
HEADS = ("fresh", "teacher", "frozen")
HEAD_TYPES = ("projection", "mlp")
PAIRINGS = ("same", "cross", "all")
OPTIMISERS = ("adamw", "sgd", "lars")
PUBLISHED_LR = 5e-4
"""DINO's for a small ViT, for a batch of 256."""

READ: dict[str, frozenset[str]] = {}
"""By objective: the fields of ``ObjectiveConfig``, of those that not all read, that it does. ``Objective`` fills it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is None is as the objective's paper has it; an option that the objective does not read is refused.

    MoCo and DisCo have no ``teacher_temp``, and SEED's is not the teacher's. ``bottleneck`` is the width of what comes out of the
    head, before fresh prototypes (elsewhere it is the teacher's). ``loss_impl`` is how the prototype loss is computed
    (``kernels.prototype_ce``), which changes speed and memory only.
    """

    name: str = "embedding"
    student_temp: Annotated[
        float | None,
        Setting(
            "0.05 to 0.2; lower is sharper. Default 0.1; for moco, disco and seed 0.2, on all their keys.", low=0.001
        ),
    ] = None
    teacher_temp: Annotated[
        float | None,
        Setting(
            "0.025 to 0.1; default the teacher's. Lower, even 0.02, when targets are near uniform. swav: Sinkhorn's epsilon. "
            "seed: of similarities, default 0.0001, which leaves little but the image itself; 0.01 also weighs similar images.",
            low=0.0001,
        ),
    ] = None
    centre_targets: Annotated[
        str | None,
        Setting(
            "What to take off the targets, where few prototypes get most images or features share a large part: "
            "calibration (the mean over the cached views), checkpoint (DINO's or iBOT's, if the teacher's file has it), running "
            "(the mean of this run's targets), none. Default none, and running for dino and ibot with --targets momentum. With "
            "embeddings: calibration or none.",
            choices=CENTRES,
        ),
    ] = None
    sinkhorn: Annotated[
        str | None,
        Setting(
            "Even out the targets' use of the prototypes over the batch, or over a queue too (batch much smaller than "
            "K), in the centre's place: none, batch, queue. Default batch for swav, none for the others, as RoB; with --targets "
            "momentum queue for swav, batch for msn. Needs all logits: not a topk store.",
            choices=SINKHORNS,
        ),
    ] = None
    sinkhorn_iterations: Annotated[
        int | None,
        Setting(
            "Rounds of Sinkhorn, default 3. 0 is a softmax at --teacher-temp, as RoB has for swav with a teacher whose "
            "prototypes SwAV did not train.",
            low=0,
        ),
    ] = None
    queue: Annotated[
        int | None,
        Setting(
            "Rows of the queue. moco, disco and seed: others' keys, default 65536; sinkhorn: 3840, of swav without a teacher "
            "from epoch 15 on (refused in a run that ends before); both at most an eighth of the images. More rows than "
            "images are refused: an image would be its own negative.",
            low=1,
        ),
    ] = None
    mean_entropy: Annotated[
        float | None,
        Setting(
            "Weight of MSN's term for using all prototypes; default 1 for msn with --targets momentum, else 0. Raise it on "
            "collapse.",
            low=0,
        ),
    ] = None
    koleo: Annotated[
        float | None,
        Setting(
            "Objectives over prototypes: weight of KoLeo, which keeps the features of a batch's images apart before the head "
            "(default 0; DINOv2 and DINOv3 0.1). Lower it when the loss falls by it alone; it wants batches of 64 and more.",
            low=0,
        ),
    ] = None
    head: Annotated[
        str | None,
        Setting(
            "The student's prototypes: fresh, teacher (start from the teacher's; dino and ibot do), frozen (and keep them).",
            choices=HEADS,
            group="Head",
        ),
    ] = None
    head_type: Annotated[
        str | None,
        Setting(
            "projection: the method's head, unit rows against prototypes (default). mlp: RoB's, straight to the logits of fresh "
            "prototypes with biases, or to the teacher's (--head frozen); --head-norm is its BatchNorm: CNNs yes, ViTs no.",
            choices=HEAD_TYPES,
            group="Head",
        ),
    ] = None
    hidden_dim: Annotated[int, Setting("Width of the head's hidden layers.", low=1, group="Head")] = 2048
    head_norm: Annotated[
        bool | None,
        Setting(
            "BatchNorm in the head; default yes, but no for moco, disco and seed, and for dino and ibot with timm's ViTs. RoB "
            "has none with dino and ibot for CNNs either.",
            group="Head",
        ),
    ] = None
    norm_by_size: Annotated[
        bool | None,
        Setting(
            "The head's BatchNorm sees the global and the local crops apart, as in MSN's code; default all crops together.",
            option="--norm-by-size/--no-norm-by-size",
            group="Head",
        ),
    ] = None
    bottleneck: int | None = None
    norm_last_layer: Annotated[
        bool | None,
        Setting(
            "dino, ibot and swav: the prototypes keep their length (default), or it is learned, as in DINO's smaller ViTs and "
            "by RoB: said to be better and less stable.",
            option="--norm-last-layer/--no-norm-last-layer",
            group="Head",
        ),
    ] = None
    patch_weight: Annotated[
        float | None,
        Setting(
            "patch, and ibot where the targets have patches: weight of the patches' loss against the views' (default 1). 0: "
            "views alone. Raise it for detection and segmentation, lower it where k-NN falls.",
            low=0,
            group="Patches",
        ),
    ] = None
    patch_standardise: Annotated[
        bool | None,
        Setting(
            "patch: the numbers of each target token are brought to mean 0 and deviation 1, as RADIO and lightly-train do; for "
            "teachers some of whose tokens are far larger than others.",
            option="--patch-standardise",
            group="Patches",
        ),
    ] = None
    patch_layer: Annotated[
        int | None,
        Setting(
            "patch: block or stage of the student whose map meets the targets, from 0, or from the end as -2; default the last. "
            "An earlier one where the last has fewer positions than the targets.",
            group="Patches",
        ),
    ] = None
    patch_from_region: Annotated[
        bool | None,
        Setting(
            "patch: local crops take part, each against the region of the cached views that it shows.",
            option="--patch-from-region",
            group="Patches",
        ),
    ] = None
    only_consistency: Annotated[bool | None, Setting("disco without InfoNCE.", option="--only-consistency")] = None
    consistency_weight: Annotated[
        float | None,
        Setting(
            "disco: weight of the squared distance, a mean over the batch (default 1). The published code sums over the "
            "32 images of a GPU: that is 32.",
            low=0,
        ),
    ] = None
    loss_impl: str = "auto"

    def __post_init__(self) -> None:
        check(self)
        if self.name not in READ:
            raise unknown_name("objective", self.name, READ)
        values = vars(self)
        for field in sorted(read_by_some() - READ[self.name]):
            if values[field] is not None:
                readers = ", ".join(name for name, fields in READ.items() if field in fields)
                raise MisuseError(f"`{field}` means nothing to `objective` {self.name}: it is for {readers}")


def read_by_some() -> frozenset[str]:
    """Fields of ``ObjectiveConfig`` that some objectives read and others do not."""
    return frozenset().union(*READ.values())


@dataclass(frozen=True)
class PairingChoice:
    """Which views are to meet. What is None is as the objective's paper and the recipe have it (``choose_pairing``)."""

    pairing: Annotated[
        str | None,
        Setting(
            "same, cross or all: which views meet. same: a global crop meets the target of its own pixels, a local one every "
            "target, as RoB released it; suits a cache best. Default same for embedding, patch, simreg, seed and disco, cross "
            "for the others.",
            choices=PAIRINGS,
        ),
    ] = None
    step_targets: Annotated[
        int | None,
        Setting(
            "Target views of an image in a step; default 2, or the 1 there is; 1 for simreg, seed, and swav with a teacher, and "
            "where the plan finds the time short.",
            low=1,
        ),
    ] = None
    num_local: Annotated[
        int | None,
        Setting(
            "Local crops of an image in a step; default the recipe's, or 0 where the plan finds them too dear (on a CPU) or too "
            "small, or with --pairing same (RoB has 4 to 10 of them there: --preset): 8 local crops of 96 px cost three quarters "
            "of the pixels of 2 global ones.",
            low=0,
        ),
    ] = None
    fresh: Annotated[
        bool | None,
        Setting(
            "With cross: new global crops every epoch, or the cached ones. With --targets momentum: the student and its copy "
            "each see their own crops (with --step-targets 1 as in MoCo's and MSN's code), or, by default, the same.",
            option="--fresh/--replay",
        ),
    ] = None
    global_weight: Annotated[
        float | None,
        Setting(
            "SSLight's alpha, 0.4 there: weight of the pairs of a target with a global crop, those with a local one have "
            "the rest. Default the recipe's: 0.4 for sslight and sslight-swav, all pairs alike for the others.",
            low=0,
            high=1,
        ),
    ] = None
    step_globals: Annotated[
        int | None,
        Setting(
            "Global crops that the student sees of an image in a step; default as many as --step-targets, and 2 for swav with a "
            "teacher, as RoB. Those beyond the targets' own are fresh.",
            low=1,
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PairingConfig:
    """``step_targets`` target views of every image in a step, against ``step_globals`` global crops (None: as many) and
    ``num_local`` local crops.

    ``fresh`` (cross only): the student's global crops are new in every epoch instead of the target's own.
    ``global_weight`` is alpha of SSLight (2210.02808): the weight of the pairs of a target with a global crop, the local crops
    having the rest; None weighs all pairs alike, as DINO does. Ranges are those of ``PairingChoice``.
    """

    pairing: str = "cross"
    step_targets: int = 2
    num_local: int = 0
    fresh: bool = True
    global_weight: float | None = None
    step_globals: int | None = None

    @property
    def replays(self) -> bool:
        """Whether the student's global crops are the targets' own, as far as there are targets."""
        return self.pairing != "cross" or not self.fresh

    @property
    def num_global(self) -> int:
        """Global crops of the student."""
        return self.step_globals or self.step_targets

    def __post_init__(self) -> None:
        PairingChoice(**vars(self))
        if self.pairing != "all" and self.replays and self.num_global < self.step_targets and not self.num_local:
            raise MisuseError(
                f"`step_globals` {self.step_globals} leaves some of `step_targets` {self.step_targets} without a crop to meet: "
                "take as many, or `num_local`"
            )
        meets_itself = self.pairing == "cross" and not self.fresh and self.step_targets == self.num_global == 1
        if meets_itself and not self.num_local:
            raise MisuseError(
                "`pairing` cross of one view with itself leaves no pair: use 2 target views, local or fresh crops"
            )
        if self.global_weight is None:
            return
        if not self.num_local:
            raise MisuseError(
                "`global_weight` is against local crops, and there are none: leave it out, or use `num_local`"
            )
        if self.global_weight == 1 and meets_itself:
            raise MisuseError(
                "`global_weight` 1 leaves no pair: one view meets only local crops, which then weigh nothing"
            )


@dataclass(frozen=True)
class OptimiserConfig:
    """Optimiser and schedule; the defaults are DINO's for a small ViT. ``weight_decay`` follows a cosine to
    ``weight_decay_end`` where that is given. ``momentum`` is for SGD and LARS.
    """

    name: Annotated[
        str,
        Setting(
            "adamw, sgd or lars. Without a teacher SSLight has lars for CNNs and adamw for ViTs, MoCo-v2 sgd.",
            choices=OPTIMISERS,
            option="--optimiser",
        ),
    ] = "adamw"
    lr: Annotated[
        float | None,
        Setting(
            "Peak rate for a batch of 256, scaled linearly. Default by the plan; 5e-4 with --epochs and --batch-size. NaN or a "
            "rising loss: halve it.",
            low=0,
        ),
    ] = None
    min_lr: Annotated[float, Setting("Where the rate's cosine ends; not scaled with the batch.", low=0)] = 1e-6
    warmup_epochs: Annotated[float | None, Setting("Default a tenth of the epochs, at most 10.", low=0)] = None
    warmup_lr: Annotated[
        float | None,
        Setting(
            "Where the warm-up begins, default 0; not scaled with the batch, but never above its peak. MSN 2e-4.", low=0
        ),
    ] = None
    weight_decay: Annotated[float, Setting("AdamW's usual one; give 1e-4 with sgd, 1e-6 with lars.", low=0)] = 0.04
    weight_decay_end: Annotated[
        float | None, Setting("Where a cosine takes the weight decay to, 0.4 for DINO's ViTs.", low=0)
    ] = None
    decay_all: Annotated[
        bool | None,
        Setting(
            "Biases and norms decay too, and with lars have own rates, as in SwAV's and MoCo's code and RoB's SwAV; default no.",
            option="--decay-all/--no-decay-all",
        ),
    ] = None
    momentum: float = 0.9
    trust: Annotated[
        float | None,
        Setting(
            "lars: a step moves a layer by --lr x this of its weights' norm (default 0.001), its biases and norms by --lr "
            "alone. 0.02 with a twentieth of the rate slows the latter, as recipes for small images do."
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def peak(self) -> float:
        """``lr``, the published one where it was left open."""
        return PUBLISHED_LR if self.lr is None else self.lr

    def warmup(self, epochs: int) -> float:
        """Epochs of warm-up in a run of ``epochs``."""
        return min(10.0, epochs / 10) if self.warmup_epochs is None else self.warmup_epochs
