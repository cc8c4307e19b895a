"""The folder of a training run: its configuration, its log, its checkpoint and its weights."""

import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, TypedDict, TypeVar

import torch
from torch import Tensor

from ..common.errors import FailureError, MisuseError, first_line
from ..common.files import append_to, flush_to_disk, lock_file, read_regular, replacing
from ..common.ranks import ALONE, Ranks, from_main, mean_over_ranks
from ..common.records import DamagedError, NoChecksumError, read_record, sealed, unsealed
from ..common.timing import Stopwatch
from .bottleneck import shares_of_step
from .checkpoint import AVERAGE_NAME, WEIGHTS_NAME, load_checkpoint, save_checkpoint
from .collapse import FIELDS

FREE_TO_CHANGE = {
    "out",
    "device",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "knn_every",
    "effort",
    "budget",
    "loader",
    "compile",
    "local_dir",
    "loggers",
    "patience",
    "data",
    "targets",
    "versions",
    "teacher_temp",
}
"""What a resumed run may change: it moves no weight. The batch size, part of ``loader``, is kept apart; files may lie
elsewhere, if what is in them is the same. So may the number of ranks: the steps are as many, over images in another order. The
``teacher_temp`` of the targets follows from the objective and the branch."""
LARGEST_LOG = 1 << 32
"""Bytes."""


class LogLine(TypedDict):
    """What is read back of a line of ``metrics.jsonl``."""

    step: int
    epoch: int
    loss: float
    lr: float
    images_per_second: float
    data_wait: float
    shares: dict[str, float]
    warning: NotRequired[str]


class EpochLine(TypedDict):
    """What is read back of a line of fine-tuning's, and is in one of a run's too."""

    epoch: int
    loss: float


T = TypeVar("T")


def refuse_what_is_no_run(out: Path) -> None:
    """MisuseError: there is something that no run can be in."""
    if out.exists() and not out.is_dir():
        raise MisuseError(f"`out` {out} is a file: give the folder to train in")
    if (out / "zarr.json").exists():
        raise MisuseError(f"`out` {out} is a target store: give the run a folder of its own")
    if (out / "config.json").exists() and not is_run(out):
        raise MisuseError(f"{out / 'config.json'} is of something else: give the run a folder of its own as `out`")
    trained = [name for name in (WEIGHTS_NAME, AVERAGE_NAME) if (out / name).exists()]
    if trained and not (out / "checkpoint.pt").exists():
        names = " and ".join(trained)
        raise MisuseError(
            f"`out` {out} has {names} and no checkpoint.pt to go on from: give another `out`, or delete {names} to train anew "
            "there"
        )


def is_run(folder: Path) -> bool:
    """Whether ``config.json`` in ``folder`` is one of rob train-student."""
    try:
        return "student" in read_record(folder / "config.json", dict[str, Any], "", unchecked=True)
    except (FileNotFoundError, FailureError):
        return False


class RunFolder:
    """Writes ``config.json``, ``metrics.jsonl``, ``train.log`` and ``checkpoint.pt``; ``student.safetensors`` comes last, with
    ``student_average.safetensors`` where there is one.

    ``config`` is the run's configuration as plain values, ``facts`` what else the weights depend on; ``config.json``
    has both. What ``watch`` has to say of a log line becomes its ``warning``; ``saved`` is called after each checkpoint, and once
    before the first step.
    """

    def __init__(
        self,
        out: Path,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        total_steps: int,
        on_log: Callable[[dict[str, Any], int], None],
        ranks: Ranks = ALONE,
        watch: Callable[[Mapping[str, Any]], str | None] = lambda line: None,
        saved: Callable[[], object] = lambda: None,
    ) -> None:
        self.out, self.total_steps, self.on_log, self.ranks, self.watch = out, total_steps, on_log, ranks, watch
        self._saved = saved
        self.log_every: int = config["log_every"]
        minutes = config.get("checkpoint_minutes")
        self._save_every, self._saved_at = math.inf if minutes is None else 60 * minutes, time.monotonic()
        self.weights, self.average, self.checkpoint = out / WEIGHTS_NAME, out / AVERAGE_NAME, out / "checkpoint.pt"
        settings = {**config, **facts}
        fixed = {k: v for k, v in settings.items() if k not in FREE_TO_CHANGE}
        self._fixed = {k: v for k, v in fixed.items() if k == "epochs"} | fixed  # first: some others go by them
        self._fixed["batch_size"] = config["loader"]["batch_size"]
        self._config_json = sealed(settings, indent=2)
        self.notes: list[str] = []
        self._health: list[Tensor] = []  # of the steps since the last line
        self._images = 0
        self._lines = 0  # of the log
        self._unlock = lambda: None
        self._lock: int | None = None

    def resume(self, state: Mapping[str, Any], device: torch.device) -> int:
        """Load the checkpoint, if there is one, into ``state``'s objects; the step to go on from.

        MisuseError: it is of other settings, or another process trains here.
        """
        step, lines = 0, 0
        saved = from_main(self._locked)
        if saved is not None:
            try:
                for name, part in state.items():
                    part.load_state_dict(saved[name])
                step = saved["step"]
                self._health = list(saved["health"].to(device))
                lines = saved.get("lines", 0)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
                raise FailureError(
                    f"{self.checkpoint} is not of this run, or of another rob ({first_line(error)}): delete it to start afresh"
                ) from error
        if not self.ranks.is_main:
            return step
        with replacing(self.out / "config.json") as file:
            file.write(self._config_json)
        self._cut_log(step, lines)
        self._saved()  # at an address: refused now where nothing may be written, and not after an epoch
        return step

    def _locked(self) -> dict[str, Any] | None:
        """What the checkpoint holds, if there is one, of a folder that is now this process's."""
        taken = f"{self.out}: another rob train-student is writing this run; wait for it, or give another `out`"
        self._lock = lock_file(self.out / ".lock", taken)
        self._unlock = weakref.finalize(self, os.close, self._lock)
        if not self.checkpoint.exists():
            return None
        anew = f"choose another `out`, where `init` {self.out} begins with what it has learned (and `extend` goes on with it)"
        return load_checkpoint(self.checkpoint, self._fixed, otherwise=anew)

    def close(self) -> None:
        """Let other processes train here."""
        self._unlock()

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is ``checkpoint_minutes`` old. The clock of the rank that writes decides alone: a step is
        the same on all of them, and the others have nothing to write."""
        return self.ranks.is_main and time.monotonic() - self._saved_at >= self._save_every

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Checkpoint after ``step`` steps. Raises FailureError, and keeps the earlier checkpoint, when the loss went bad."""
        health = self.check_losses(step)
        if not self.ranks.is_main:
            return
        self._check_there()
        # What is logged must not be lost once its steps will not be run again.
        for name in ("metrics.jsonl", "train.log"):
            if (self.out / name).exists():
                with append_to(self.out / name) as file:
                    flush_to_disk(file)
        parts = {name: part.state_dict() for name, part in state.items()}
        found = {"step": step, "health": health, "lines": self._lines}
        save_checkpoint(self.checkpoint, parts | found, self._fixed)
        self._saved()
        self._saved_at = time.monotonic()  # from its end: one that takes long must not fill the time

    def _check_there(self) -> None:
        """FailureError: the folder was moved or deleted. Writing would not notice, and make another with half a run in it."""
        try:
            there = self._lock is None or os.path.samestat(os.fstat(self._lock), os.stat(self.out / ".lock"))
        except OSError:
            there = False
        if not there:
            raise FailureError(f"{self.out} was moved or deleted while its run went on: put it back, or start again")

    def is_logged(self, step: int) -> bool:
        """Whether a line is written after step number ``step`` (from 1)."""
        return step % self.log_every == 0 or step == self.total_steps

    def log(
        self,
        step: int,
        epoch: int,
        health: Tensor,
        rate: float,
        images: int,
        stopwatch: Stopwatch,
        targets: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take note of step number ``step`` (from 1); every ``log_every`` steps write a line.

        health: (2,) loss and gradient norm, left on the device until a line is written, so that the device is not waited for. Of
        several ranks the mean: each has the loss of its share.
        targets: what ``collapse`` says of this step's targets.
        """
        self._health.append(mean_over_ranks(health))
        self._images += images
        if not self.is_logged(step):
            return
        values = self.check_losses(step)
        self._health.clear()
        seconds, passed = stopwatch.take()
        if not self.ranks.is_main:
            return
        self._check_there()
        shares = shares_of_step(seconds, passed)
        line = {
            "step": step,
            "epoch": epoch,
            "loss": float(values[:, 0].mean()),
            "gradient_norm": float(values[:, 1].mean()),
            "lr": rate,
            "images_per_second": round(self._images * self.ranks.world_size / passed, 1),
            "data_wait": shares["data"],
            "shares": shares,
            **{name: round(float(value), 4) for name, value in (targets or {}).items()},
        }
        self._images = 0
        if warning := self.watch(line):
            line["warning"] = warning
        for name, text in (("metrics.jsonl", sealed(line)), ("train.log", self._sentence(line).encode())):
            try:
                with append_to(self.out / name) as file:
                    file.write(text)
            except OSError as error:
                raise FailureError(f"cannot write {self.out / name}: {error.strerror or error}") from error
        self._lines += 1
        self.on_log(line, self.total_steps)

    def check_losses(self, step: int) -> Tensor:
        """The (loss, gradient norm) pairs since the last line, (n, 2) on the CPU. FailureError names the first bad step."""
        if not self._health:
            return torch.zeros(0, 2)
        values = torch.stack(self._health).float().cpu()
        bad = (~values.isfinite()).any(1).nonzero()[:, 0]
        if len(bad):
            at = step - len(values) + int(bad[0]) + 1
            kept = (
                f"the last good checkpoint is kept in {self.checkpoint}"
                if self.checkpoint.exists()
                else "there is no checkpoint yet"
            )
            loss, norm = values[bad[0]].tolist()
            raise FailureError(
                f"step {at}: the loss is {loss:g} with gradient norm {norm:g}; {kept}. Lower `lr`, lengthen `warmup_epochs`, "
                "or use `precision` fp32 or bf16"
            )
        return values

    def medians(self) -> tuple[float, float, dict[str, float]]:
        """Last loss, median images/s and median share of the time of each part of a step, over the whole run's log (else
        NaN, and no shares)."""
        lines = read_log(self.out) if self.ranks.is_main else []
        if not lines:
            return math.nan, math.nan, {}
        shares = {name: median(x["shares"][name] for x in lines) for name in lines[-1]["shares"]}
        return lines[-1]["loss"], median(x["images_per_second"] for x in lines), shares

    def _cut_log(self, step: int, written: int) -> None:
        """Drop what a killed run logged after its last checkpoint: those steps are run again. ``written``: lines until then."""
        lines = [line for line in read_log(self.out, unchecked=True) if line["step"] <= step]
        self._lines = len(lines)
        if len(lines) < written:
            self.notes.append(
                f"{self.out / 'metrics.jsonl'} has lost {written - len(lines)} of the {written} lines up to step {step}"
            )
        with replacing(self.out / "metrics.jsonl") as file:
            file.write(b"".join(map(sealed, lines)))
        with replacing(self.out / "train.log") as file:
            file.write("".join(map(self._sentence, lines)).encode())

    def _sentence(self, line: Mapping[str, Any]) -> str:
        """A line of ``train.log``."""
        targets = "".join(f", {name.replace('_', ' ')} {line[name]:.3g}" for name in FIELDS if name in line)
        warning = f"{line['warning']}\n" if "warning" in line else ""
        return (
            f"epoch {line['epoch']} step {line['step']}/{self.total_steps} loss {line['loss']:.4f} lr {line['lr']:.2e} "
            f"{line['images_per_second']:.0f} images/s, {line['data_wait']:.1%} waiting for data{targets}\n{warning}"
        )


def flat_settings(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """``{"optimiser": {"lr": 1}}`` -> ``{"optimiser.lr": 1}``; lists stay."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat_settings(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found


def read_log(run: Path, unchecked: bool = False) -> list[LogLine]:
    """The lines of a run's ``metrics.jsonl``, as ``read_lines``."""
    return read_lines(run / "metrics.jsonl", LogLine, unchecked)


def read_lines(metrics: Path, kind: type[T], unchecked: bool = False) -> list[T]:
    """The lines of a log, none where there is none; a last one that was cut short is left out.

    FailureError: a line is not what a run writes. ``unchecked``: those of a rob from before checksums pass.
    """
    lines = read_regular(metrics, LARGEST_LOG).splitlines(keepends=True) if metrics.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                found.append(unsealed(line, kind, unchecked))
            except NoChecksumError as problem:
                remedy = "run the same command again, which writes it anew"
                raise FailureError(f"{metrics}: line {number} {problem}: {remedy}") from None
            except DamagedError as problem:
                raise FailureError(f"{metrics}: line {number} {problem}: delete that line") from None
    return found
