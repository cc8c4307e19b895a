"""An interruption changes nothing, and what cannot go on says so and loses nothing."""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rob.common.errors import FailureError, MisuseError
from rob.student_train import run_folder
from rob.student_train.objectives import OBJECTIVES
from rob.student_train.objectives.embedding import EmbeddingObjective
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.run_folder import RunFolder
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, train_student
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from support.tiny import tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, NO_WARM_UP, STEPS_PER_EPOCH, STUDENT, curve, log_of, online

# ==== interruptions change nothing ====


def sigint_in_step(number: int) -> Callable:
    """Trainer.step as it is, with Ctrl-C pressed in the middle of step ``number`` (from 1): after the weights moved."""
    original = Trainer.step

    def step(self: Trainer, at: int, crops: list[Tensor], target: Any, weights: Tensor) -> tuple[Tensor, float]:
        health, rate = original(self, at, crops, target, weights)
        if at + 1 == number:
            signal.raise_signal(signal.SIGINT)
        return health, rate

    return step


def interrupt_at(number: int) -> TrainProgress:
    def log(line: dict[str, Any], total: int) -> None:
        if line["step"] == number:
            raise KeyboardInterrupt

    return TrainProgress(log=log)


@pytest.fixture
def stochastic(config) -> TrainConfig:
    """A run whose every part has a state: drop-path draws, BatchNorm, AdamW, a moving average, lines of four steps."""
    return replace(config, student=replace(STUDENT, drop_path=0.3), average=0.9, log_every=4)


def same_outcome(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    for name in ("student.safetensors", "student_average.safetensors"):
        torch.testing.assert_close(load_file(one / name), load_file(other / name), rtol=0, atol=0)


def test_two_epochs_and_two_are_four(stochastic, tmp_path):
    whole, halves = replace(stochastic, log_every=1), replace(stochastic, out=tmp_path / "halves", log_every=1)
    train_student(whole)
    with pytest.raises(KeyboardInterrupt):
        train_student(halves, progress=interrupt_at(2 * STEPS_PER_EPOCH))
    assert not (halves.out / "student.safetensors").exists()
    seen: list[int] = []
    train_student(halves, progress=TrainProgress(log=lambda line, total: seen.append(line["step"])))
    assert seen == [7, 8, 9, 10, 11, 12]
    same_outcome(whole.out, halves.out)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "moco", "queue": 20},
        {"name": "swav", "queue": 10},
        {"name": "dino", "centre_targets": "running"},
    ],
    ids=lambda settings: settings["name"],
)
def test_what_an_objective_gathers_is_resumed_too(config, tmp_path, settings):
    """A queue in the middle of its ring, or a running centre, in the middle of the second epoch."""
    pairing = PairingConfig(OBJECTIVES[settings["name"]].pairing, step_targets=2)
    config = replace(config, objective=replace(config.objective, **settings), pairing=pairing, epochs=2)
    halves = replace(config, out=tmp_path / "halves")
    train_student(config)
    with pytest.raises(KeyboardInterrupt):
        train_student(halves, progress=interrupt_at(2 * STEPS_PER_EPOCH - 1))
    train_student(halves)
    assert curve(config.out) == curve(halves.out)
    assert len(curve(config.out)) == 2 * STEPS_PER_EPOCH
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True)["state"] for out in (config.out, halves.out))
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)


def test_a_batch_in_parts_is_resumed_too(stochastic, tmp_path):
    """Paths and patches are dropped, a queue and an average follow; without parts the run is another."""
    student = replace(STUDENT, name="test_vit", small_images=True, drop_path=0.3, patch_drop=0.3)
    objective = replace(stochastic.objective, name="moco", queue=20)
    pairing = PairingConfig("cross", step_targets=2, num_local=1)
    steps = {"accumulate": 4, "clip_grad": 0.01, "clip_each": True, "log_every": 1, "epochs": 2}
    parts = replace(stochastic, student=student, objective=objective, pairing=pairing, **steps)
    train_student(parts)
    halves = replace(parts, out=tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        train_student(halves, progress=interrupt_at(2 * STEPS_PER_EPOCH - 1))
    with pytest.raises(MisuseError, match="was made with accumulate = 4, this run has accumulate = 2"):
        train_student(replace(halves, accumulate=2))
    train_student(halves)
    same_outcome(parts.out, halves.out)
    assert len(curve(parts.out)) == 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_ctrl_c_in_the_middle_of_a_step_of_an_epoch(stochastic, tmp_path, monkeypatch, backend):
    stochastic = replace(stochastic, loader=replace(LOADER, backend=backend))
    train_student(stochastic)
    stopped = replace(stochastic, out=tmp_path / "stopped")
    notes: list[str] = []
    for number in (5, 7):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "step", sigint_in_step(number))
            train_student(stopped, progress=TrainProgress(note=notes.append))
    expected = [f"stopped at step {n} of 12: run the same command again to go on from there" for n in (5, 7)]
    assert [note for note in notes if note.startswith("stopped")] == expected
    train_student(stopped)
    same_outcome(stochastic.out, stopped.out)


def test_a_killed_run_goes_on_from_its_last_checkpoint(stochastic, tmp_path, monkeypatch):
    train_student(stochastic)
    killed = replace(stochastic, out=tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "step", killed_in_step(8))
        train_student(killed)
    assert [line["step"] for line in log_of(killed.out)] == [4]
    train_student(killed)
    same_outcome(stochastic.out, killed.out)


def test_a_killed_run_goes_on_from_a_checkpoint_in_mid_epoch(stochastic, tmp_path, monkeypatch):
    """Between two lines of the log, too; three steps are an epoch, which writes none here."""
    stochastic = replace(stochastic, checkpoint_every=99)
    train_student(stochastic)
    killed = replace(stochastic, out=tmp_path / "killed", checkpoint_minutes=10)
    clock, step = [0.0], killed_in_step(9)

    def five_minutes(self: Trainer, *arguments: Any) -> tuple[Tensor, float]:
        clock[0] += 300
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        patch.setattr(Trainer, "step", five_minutes)
        saved: list[int] = []
        save = RunFolder.save
        patch.setattr(RunFolder, "save", lambda self, state, at: (saved.append(at), save(self, state, at)))
        train_student(killed)
    assert saved == [2, 4, 6, 8]  # the sixth ends an epoch
    assert torch.load(killed.out / "checkpoint.pt", weights_only=True)["state"]["step"] == 8
    train_student(replace(killed, checkpoint_minutes=None))
    same_outcome(stochastic.out, killed.out)


def killed_in_step(number: int) -> Callable:
    original = Trainer.step

    def step(self: Trainer, at: int, *arguments: Any) -> tuple[Tensor, float]:
        if at + 1 == number:
            raise SystemExit
        return original(self, at, *arguments)

    return step


def test_a_finished_run_is_not_run_again(config, monkeypatch):
    saved: list[int] = []
    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda self, state, at: (saved.append(at), save(self, state, at)))
    first = train_student(replace(config, epochs=1))
    weights = load_file(first.weights)
    monkeypatch.setattr(Trainer, "step", killed_in_step(1))
    second = train_student(replace(config, epochs=1))
    assert second == first
    torch.testing.assert_close(load_file(second.weights), weights, rtol=0, atol=0)
    assert saved == [first.steps]  # once


def test_another_teacher_store_or_setting_is_refused_on_resume(config, data, teacher, store, tmp_path):
    config = replace(config, epochs=1)
    train_student(config)
    other = tiny_teacher_checkpoint(tmp_path, seed=1, prototypes=10)
    other_store = tiny_store(tmp_path / "other.zarr", data, other, loader=LOADER)
    for changed, field in [
        (replace(config, optimiser=replace(NO_WARM_UP, lr=1e-3)), r"optimiser\.lr = 0\.0005"),
        (replace(config, targets=Cached(other_store.path)), r"branch\.weights_hash = "),
    ]:
        with pytest.raises(MisuseError, match=field):
            train_student(changed)
    with pytest.raises(MisuseError, match=r"branch\.kind = cached, this run has branch\.kind = online"):
        train_student(replace(config, targets=online(teacher, store)))
    train_student(replace(config, loader=replace(LOADER, workers=2), log_every=5))  # these move no weight


def test_sigterm_saves_and_the_command_goes_on(config, data, store, tmp_path, monkeypatch):
    """In the middle of an epoch, and with checkpoints that are further apart."""
    from rob import cli

    step, stop_at = Trainer.step, 4

    def terminated(self, number, *rest):
        if number == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, *rest)

    def outcome(out: Path) -> int:
        words = [data.path, "--targets", store.path, "--out", out, "--student", "test_resnet", "--image-size", 32]
        fast = ["--epochs", 3, "--batch-size", 8, "--hidden-dim", 16, "--workers", 1, "--log-every", 1]
        options = [*fast, "--loader", "torch", "--device", "cpu", "--checkpoint-every", 3, "--drop-path", 0.2]
        monkeypatch.setattr(sys, "argv", ["rob", "train-student", *map(str, words + options)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert outcome(whole) == 0
    monkeypatch.setattr(Trainer, "step", terminated)
    assert outcome(stopped) == 143
    stop_at = -1
    assert len(log_of(stopped)) == 5  # the step that the signal came in is whole
    assert not (stopped / "student.safetensors").exists()
    assert outcome(stopped) == 0
    assert curve(stopped) == curve(whole)
    checkpoints: list[int] = []
    save = RunFolder.save
    monkeypatch.setattr(
        RunFolder, "save", lambda self, state, step: (checkpoints.append(step), save(self, state, step))
    )
    assert outcome(tmp_path / "again") == 0
    assert checkpoints == [9]  # after three epochs, which is the end


# ==== a loss that stops being a number ====


def spoilt_in_call(number: int) -> Callable:
    original, calls = EmbeddingObjective.forward, []

    def forward(self: EmbeddingObjective, *arguments: Any) -> Tensor:
        calls.append(True)
        return original(self, *arguments) * (float("nan") if len(calls) == number else 1.0)

    return forward


@pytest.mark.parametrize("log_every", [1, 100])
def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(config, monkeypatch, tmp_path, log_every):
    config = replace(config, epochs=2, log_every=log_every)
    with monkeypatch.context() as patch, pytest.raises(FailureError, match=r"^step 5: the loss is nan.*checkpoint\.pt"):
        patch.setattr(EmbeddingObjective, "forward", spoilt_in_call(5))
        train_student(config)
    assert not (config.out / "student.safetensors").exists()
    train_student(config)
    train_student(replace(config, out=tmp_path / "whole"))
    assert curve(config.out) == curve(tmp_path / "whole")


@pytest.mark.parametrize("objective", ["embedding", "dino"])
def test_a_rate_far_too_high_is_one_sentence(config, objective):
    config = replace(
        config,
        objective=replace(config.objective, name=objective),
        pairing=PairingConfig("cross", step_targets=1),
        optimiser=OptimiserConfig("sgd", lr=1e38, warmup_epochs=0),
        clip_grad=0.0,
    )
    with pytest.raises(FailureError, match=r"^step \d+: the loss is .*; .* Lower `lr`"):
        train_student(config)
