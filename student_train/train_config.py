"""The settings of a training run, and of what is made of one."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from ..common.config import Data, Device, Precision, Seed
from ..common.errors import MisuseError
from ..common.settings import Setting, check
from ..common.views.config import LoaderConfig
from .config import ObjectiveConfig, OptimiserConfig, PairingChoice, PairingConfig, StudentConfig
from .targets.config import TargetsConfig


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, against which ``targets``, and how.

    ``objective`` None is the usual one of such targets, or a function gives it by that one's name; what ``pairing`` leaves open
    is as the objective's paper has it.
    """

    data: Data
    out: Annotated[Path, Setting("The run folder. A run that was killed goes on from its checkpoint there.")]
    student: StudentConfig
    targets: TargetsConfig
    objective: ObjectiveConfig | Callable[[str], ObjectiveConfig] | None = None
    pairing: PairingConfig | PairingChoice | None = None
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    epochs: Annotated[int, Setting("Passes over the images.", low=1)] = 100
    local_size: Annotated[
        int | None, Setting("Side in pixels of a local crop; default in the recipe's proportion.", low=8)
    ] = None
    clip_grad: Annotated[float, Setting("Largest gradient norm; 0: no limit.", low=0)] = 3.0
    clip_each: Annotated[
        bool | None,
        Setting(
            "--clip-grad holds for each weight tensor by itself, as DINO's 3.0 does, not for all of them together.",
            option="--clip-each",
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
        ),
    ] = None
    average: Annotated[
        float | None,
        Setting("Decay of a moving average of the student, exported beside it (0.99 to 0.9999).", low=0, high=1),
    ] = None
    seed: Seed = 0
    precision: Precision = "fp32"
    device: Device = "auto"
    loader: Annotated[LoaderConfig, {"batch_size": Setting("Images a step. Lower it when memory runs out.", low=2)}] = (
        field(default_factory=lambda: LoaderConfig(batch_size=256))
    )
    log_every: Annotated[int, Setting("Steps per log line.", low=1)] = 10
    checkpoint_every: Annotated[
        int,
        Setting("Epochs per checkpoint. Ctrl-C and SIGTERM write one too; a kill or a crash does not.", low=1),
    ] = 1

    def __post_init__(self) -> None:
        if self.average is not None and not 0 < self.average < 1:
            raise MisuseError(f"`average` is {self.average:g}, expected a value between 0 and 1, such as 0.999")
        check(self)
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
class ExportConfig:
    """Of which run, and where to. ``half`` halves the file; the teacher computes in float32 whatever its file holds."""

    run: Annotated[Path, Setting("A run folder with its checkpoint.pt.", argument="RUN")]
    out: Annotated[Path, Setting("The teacher's file.", argument="OUT.safetensors")]
    image_size: Annotated[
        int | None, Setting("Side in pixels that the teacher sees views at; default the student's.", low=8)
    ] = None
    half: Annotated[bool, Setting("Store float16: half the bytes.", option="--half")] = False

    def __post_init__(self) -> None:
        check(self)
        if self.out.suffix != ".safetensors":
            raise MisuseError(f"`out` {self.out}: name it {self.out.with_suffix('.safetensors')}")
