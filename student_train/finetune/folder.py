"""The folder of a fine-tuning: settings, log, checkpoint, weights and result."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.exported import StudentInfo
from ...common.files import locked, replacing
from ...common.records import sealed
from ...common.run import allow_fast_arithmetic, autocast, choose_precision, pick_device, seed_everything, versions
from ...common.weights import hash_weights
from ..checkpoint import AVERAGE_NAME, BEST_NAME, WEIGHTS_NAME, load_checkpoint, load_student
from ..epochs import Kept, Training
from ..optimiser import decayed_groups, may_fuse, warm_cosine
from ..run_folder import is_run
from ..students import create_student
from .config import ClassifyConfig, SegmentConfig
from .tuned import TASKS

FREE_TO_CHANGE = ("run", "train", "val", "out", "overwrite", "device", "loader", "workers")
"""What a run that goes on may change: it moves no weight, or is kept by its content."""


@dataclass(frozen=True)
class TuneProgress:
    """What a caller may show: steps (done, all, text), images tested (done, all), and notes."""

    train: Callable[[int, int, str], None] = lambda done, total, text: None
    test: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Start:
    """What is trained from: a student, or the same network with random weights."""

    device: torch.device
    precision: str
    backbone: nn.Module
    info: StudentInfo
    source: str
    """Hash of the weights."""


def start_of(config: ClassifyConfig | SegmentConfig) -> Start:
    """MisuseError: a device, a precision or a student that cannot be."""
    device = pick_device(config.device)
    precision = choose_precision(device, config.precision)
    autocast(device, precision)  # refuses what this device does not have
    allow_fast_arithmetic(device, precision)
    backbone, info = load_student(config.run)
    source = hash_weights(backbone.state_dict())
    seed_everything(config.seed)
    if config.init == "random":
        backbone = create_student(info)
    return Start(device, precision, backbone, info, source)


@contextmanager
def tuning_folder(
    config: ClassifyConfig | SegmentConfig, task: str, start: Start, facts: Mapping[str, Any]
) -> Iterator[Kept]:
    """The folder, locked, with ``config.json`` in it. ``facts`` is what else the weights depend on.

    MisuseError: it is no folder of this task's, or another process works there.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise MisuseError(f"`out` {out} is a file: give the folder to fine-tune in")
    owned = (WEIGHTS_NAME, AVERAGE_NAME, BEST_NAME, "zarr.json", *(t.file for name, t in TASKS.items() if name != task))
    foreign = next((name for name in owned if (out / name).exists()), None)
    if foreign:
        raise MisuseError(
            f"`out` {out} holds {foreign}, of something else: give the fine-tuned network a folder of its own"
        )
    if is_run(out):
        raise MisuseError(f"`out` {out} is a run of rob train-student: give the fine-tuned network a folder of its own")
    checkpoint = out / "checkpoint.pt"
    if (out / TASKS[task].file).exists() and not checkpoint.exists() and not config.overwrite:
        raise MisuseError(
            f"`out` {out} has {TASKS[task].file} and no checkpoint.pt to go on from: pass `overwrite` to train anew there"
        )
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    settings |= {"task": task, "precision": start.precision, "weights": start.source, **facts}
    if isinstance(config, ClassifyConfig):
        settings["batch_size"] = config.loader.batch_size
    taken = f"{out}: another rob finetune is at work there; wait for it, or give another `out`"
    with locked(out / ".lock", taken):
        if config.overwrite:
            for name in ("checkpoint.pt", "metrics.jsonl", "result.json", TASKS[task].file):
                (out / name).unlink(missing_ok=True)
        if checkpoint.exists():
            load_checkpoint(checkpoint, settings)  # refuses other settings while config.json is still that of the run
        told = {**asdict(config), "facts": facts, "weights": start.source, "versions": versions("rob", "torch", "timm")}
        with replacing(out / "config.json") as file:
            file.write(sealed(told, indent=2))
        yield Kept(checkpoint, settings)


def write_history(out: Path, history: Sequence[Mapping[str, float]]) -> None:
    """``metrics.jsonl``: a line an epoch."""
    with replacing(out / "metrics.jsonl") as file:
        file.write(b"".join(sealed({"epoch": number, **line}) for number, line in enumerate(history, 1)))


def write_outcome(out: Path, outcome: Mapping[str, Any]) -> None:
    with replacing(out / "result.json") as file:
        file.write(sealed(outcome, indent=2))


def training_of(
    config: ClassifyConfig | SegmentConfig,
    start: Start,
    model: nn.Module,
    steps: int,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    loss: Callable[[tuple[Tensor, Tensor]], Tensor],
) -> Training[tuple[Tensor, Tensor]]:
    """AdamW under a warm cosine, ``steps`` an epoch."""
    return Training(
        model=model.train(),
        optimiser=torch.optim.AdamW(
            decayed_groups(model, config.weight_decay), lr=config.lr, fused=may_fuse(model, start.precision)
        ),
        batches=batches,
        loss=loss,
        rate=warm_cosine(config.epochs * steps),
        epochs=config.epochs,
        steps_per_epoch=steps,
        device=start.device,
        precision=start.precision,
        clip=1.0,
        seed=config.seed,
    )
