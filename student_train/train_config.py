"""The settings of a training run."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..common.errors import MisuseError
from ..common.views.loader import LoaderConfig
from .objectives import ObjectiveConfig
from .optimiser import OptimiserConfig
from .students import StudentConfig
from .targets.branch import TargetsConfig
from .targets.pairing import PairingConfig


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, against which ``targets``, and how.

    ``objective`` None is the usual one of such targets, ``pairing`` None what the objective's paper has (``choose_pairing``).
    ``local_size`` None scales the recipe's local size with the student's image size. ``average`` keeps an exponential moving
    average of the student with that decay beside it. ``clip_grad`` bounds the gradient's norm, 0 leaves it alone.
    ``freeze_prototypes`` keeps the student's prototypes still for so many epochs; None: one where DINO and SwAV do it.
    ``checkpoint_every`` is in epochs.
    """

    data: Path
    out: Path
    student: StudentConfig
    targets: TargetsConfig
    objective: ObjectiveConfig | None = None
    pairing: PairingConfig | None = None
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    epochs: int = 100
    local_size: int | None = None
    clip_grad: float = 3.0
    freeze_prototypes: int | None = None
    average: float | None = None
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(batch_size=256))
    log_every: int = 10
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "log_every": self.log_every, "checkpoint_every": self.checkpoint_every}
        for name, value in counts.items():
            if value < 1:
                raise MisuseError(f"`{name}` is {value}, expected at least 1")
        if isinstance(self.targets, str | Path):
            raise MisuseError(f"`targets` is a path: give Cached({str(self.targets)!r}), or Online or Momentum")
        if self.average is not None and not 0 < self.average < 1:
            raise MisuseError(f"`average` is {self.average:g}, expected a value between 0 and 1, such as 0.999")

    def to_dict(self) -> dict[str, Any]:
        """All but the targets, of which the branch says more, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "targets"}
        return {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}
