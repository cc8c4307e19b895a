"""The settings of a training run, and of what is made of one."""

import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from ..common.config import Data, Device, LocalDir, Overwrite, Precision, Seed
from ..common.errors import MisuseError
from ..common.settings import Setting, check
from ..common.views.config import LoaderConfig
from .config import ObjectiveConfig, OptimiserConfig, PairingChoice, PairingConfig
from .student_config import PRETRAINED, StudentConfig
from .targets.config import TargetsConfig

LOGGERS = ("tensorboard", "wandb", "mlflow")
COMPILE = ("off", "default", "reduce-overhead")
EFFORTS = ("minutes", "hours", "full")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(budget: str | None) -> float | None:
    """``20m`` -> 1200.0, ``1h30m`` -> 5400.0. MisuseError: it is no time."""
    if budget is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])[a-z]*", budget.lower())
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not seconds or not re.fullmatch(r"(\s*\d+(\.\d+)?\s*[smhd][a-z]*)+\s*", budget.lower()):
        raise MisuseError(f"`budget` is {budget!r}, expected a time such as 20m, 90s or 1h30m")
    return seconds


USUAL_BATCH = 256
"""Images a step, as DINO's rates are quoted for."""


class LoaderByPlan(LoaderConfig):
    """One whose ``batch_size`` nobody asked for: the plan finds another."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, against which ``targets``, and how.

    ``objective`` None is the usual one of such targets; what ``pairing`` leaves open is as the objective's paper has it. What is
    None of ``epochs``, ``optimiser.lr`` and ``student.small_images``, how many local crops there are, and the batch where no
    ``loader`` is given, is chosen for the images and the machine (``plan.make_plan``).
    """

    data: Data
    out: Annotated[
        Path,
        Setting(
            "The run folder. A run that was killed goes on from its checkpoint there. An address, s3://, gs:// or "
            "az://BUCKET/NAME: then it is copied there at each checkpoint, and goes on on any machine.",
            address=True,
        ),
    ]
    student: StudentConfig
    targets: TargetsConfig
    objective: ObjectiveConfig | None = None
    pairing: PairingConfig | PairingChoice | None = None
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    epochs: Annotated[
        int | None,
        Setting("Passes over the images; default as many as --effort or --budget has steps and time for.", low=1),
    ] = None
    effort: Annotated[
        str | None,
        Setting(
            "How long the plan may train, where --epochs are not given: minutes (15; default on a CPU), hours (4; default on a "
            "GPU), full (100 epochs or more, as in papers). Never less than one pass over the images and 1,000 steps.",
            choices=EFFORTS,
        ),
    ] = None
    budget: Annotated[str | None, Setting("The same as a time: 20m, 90s, 2h. The plan fills it.")] = None
    extend: Annotated[
        int | None,
        Setting(
            "With --init RUN: go on with that run, finished or stopped, for so many epochs: student, head, optimiser and "
            "whatever else its checkpoint has, under a new schedule. It is a run of its own, with another --out, that names its "
            "parent. Student, head, pairing, optimiser and batch are as there unless given; give what belongs to the targets, "
            "--seed and --precision again. A tenth of the --lr disturbs less.",
            low=1,
        ),
    ] = None
    knn_every: Annotated[
        int | None,
        Setting(
            "Epochs after which the student is compared with its random start, besides at the end: by k-NN, without labels by "
            "the neighbours that it shares with the teacher, without both by RankMe, the effective rank of its embeddings "
            "(whichever there is goes to knn.jsonl). The best so far is kept as student_best.safetensors.",
            low=1,
        ),
    ] = None
    patience: Annotated[
        int | None,
        Setting(
            "With --knn-every: end the run when so many measurements in a row were no better than the best (3 to 10; with fewer "
            "chance ends it). The rate's schedule is then cut off, so student_best.safetensors is the one to take.",
            low=1,
        ),
    ] = None
    local_size: Annotated[
        int | None,
        Setting("Side in pixels of a local crop; default in the recipe's proportion.", low=8, group="Which views meet"),
    ] = None
    clip_grad: Annotated[float, Setting("Largest gradient norm; 0: no limit.", low=0, group="Optimiser")] = 3.0
    clip_each: Annotated[
        bool | None,
        Setting(
            "--clip-grad holds for each weight tensor by itself, as DINO's 3.0 does, not for all of them together.",
            option="--clip-each/--no-clip-each",
            group="Optimiser",
        ),
    ] = None
    accumulate: Annotated[
        int | None,
        Setting(
            "Parts that a batch goes through the student in, one after the other, where memory is short: 4 for a batch of "
            "1024 on a card that holds 256. Loss, centre, queue and rate are those of the whole batch; the student's "
            "BatchNorm sees the parts. Each part is run twice: a third more time.",
            low=1,
        ),
    ] = None
    freeze_prototypes: Annotated[
        int | None,
        Setting(
            "Epochs at the start in which the student's prototypes stay. Default 1 with --targets momentum and "
            "dino, ibot or swav, else 0. A loss that stays at log K: one more.",
            low=0,
            group="Head",
        ),
    ] = None
    average: Annotated[
        float | None,
        Setting(
            "Decay of a moving average of the student, exported beside it (0.99 to 0.9999). It grows with the steps, "
            "1 - steps^(-2/3) at most: .998 after 10,000, .9999 after a million.",
            low=0,
            high=1,
        ),
    ] = None
    seed: Seed = 0
    precision: Precision = "auto"
    compile: Annotated[
        str | None,
        Setting(
            "Compile the student: minutes at the start, then fewer and larger kernels. off, default, or reduce-overhead: its "
            "passes are replayed as CUDA graphs, for small students whose kernels take longer to launch than to run (rob "
            "gpu-check times it; one GPU, no --accumulate, no --knn-every). Default what rob gpu-check found to be faster on "
            "this GPU, else off.",
            choices=COMPILE,
        ),
    ] = None
    sync_batchnorm: Annotated[
        bool | None,
        Setting(
            "Under torchrun, BatchNorm goes by the joined batch of a machine's ranks, or by each rank's own. Default joined for "
            "dino, ibot, swav and msn (in the code of all but swav over all machines), else not (moco, seed and disco). Joining "
            "costs two waits among the ranks a layer; with fewer than 32 images a rank it is worth them.",
            option="--sync-batchnorm/--no-sync-batchnorm",
        ),
    ] = None
    local_dir: LocalDir = None
    device: Device = "auto"
    loader: Annotated[LoaderConfig, {"batch_size": None}] = field(
        default_factory=lambda: LoaderByPlan(batch_size=USUAL_BATCH)
    )
    log_every: Annotated[int, Setting("Steps per log line.", low=1)] = 10
    loggers: Annotated[
        tuple[str, ...],
        Setting(
            "Tell tensorboard, wandb or mlflow, too; give it several times for several. Each is a package (rob[tensorboard] ...) "
            "and goes by its own variables: WANDB_MODE=offline sends nothing. metrics.jsonl is written in any case.",
            choices=LOGGERS,
            option="--logger",
        ),
    ] = ()
    checkpoint_every: Annotated[
        int,
        Setting("Epochs per checkpoint. Ctrl-C and SIGTERM write one too; a kill or a crash does not.", low=1),
    ] = 1
    checkpoint_minutes: Annotated[
        float | None,
        Setting(
            "A checkpoint after so many minutes, too, in the middle of an epoch: what a crash, or a machine that is taken away, "
            "costs at most. 10 to 30 where an epoch takes hours; on a GPU one costs about a second.",
            low=0.1,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.average is not None and not 0 < self.average < 1:
            raise MisuseError(f"`average` is {self.average:g}, expected a value between 0 and 1, such as 0.999")
        check(self)
        seconds_of(self.budget)
        if self.budget and (self.effort or self.epochs):
            other = "effort" if self.effort else "epochs"
            raise MisuseError(f"`budget` and `{other}` both say how long to train: leave one of them out")
        if self.extend and (self.budget or self.effort or self.epochs not in (None, self.extend)):
            other = "budget" if self.budget else "effort" if self.effort else "epochs"
            raise MisuseError(f"`extend` and `{other}` both say how long to train: leave one of them out")
        if self.extend and self.student.init in (None, PRETRAINED):
            raise MisuseError(f"`extend` {self.extend} goes on with another run: give its folder as `init` RUN")
        if self.extend and Path(self.student.init or "") == self.out:
            raise MisuseError(f"`extend` makes a run of its own: give another `out` than {self.out}, which goes on")
        if self.effort and self.epochs:
            raise MisuseError("`effort` and `epochs` both say how long to train: leave one of them out")
        if self.patience and not self.knn_every:
            raise MisuseError(f"`patience` {self.patience} goes by what `knn_every` measures: give that too, such as 1")
        if self.clip_each and not self.clip_grad:
            raise MisuseError(
                "`clip_each` needs a limit, and `clip_grad` is 0: use `clip_grad` 3, or leave `clip_each` out"
            )
        if isinstance(self.targets, str | Path):
            raise MisuseError(f"`targets` is a path: give Cached({str(self.targets)!r}), or Online or Momentum")

    def to_dict(self) -> dict[str, Any]:
        """All but the targets, of which the branch says more, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "targets"}
        return {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in values.items()
        }


@dataclass(frozen=True)
class ExportTeacherConfig:
    """Of which run, and where to. ``half`` halves the file; the teacher computes in float32 whatever its file holds."""

    run: Annotated[Path, Setting("A run folder with its checkpoint.pt.", argument="RUN")]
    out: Annotated[Path, Setting("The teacher's file.", argument="OUT.safetensors")]
    image_size: Annotated[
        int | None, Setting("Side in pixels that the teacher sees views at; default the student's.", low=8)
    ] = None
    half: Annotated[bool, Setting("Store float16: half the bytes.", option="--half")] = False
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check(self)
        if self.out.suffix != ".safetensors":
            raise MisuseError(f"`out` {self.out}: name it {self.out.with_suffix('.safetensors')}")
