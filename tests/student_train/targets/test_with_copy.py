"""A teacher, and a copy of the student beside it: the same from a store and online, resumed, exported, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rob.cli import app
from rob.common.errors import MisuseError
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import OBJECTIVES, ObjectiveConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.joined import PairTarget
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.targets.with_copy import WithCopy
from rob.student_train.train import TrainProgress, train_student
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from support.training import CPU, STEPS_PER_EPOCH, curve, online, refused

DISCO = ObjectiveConfig("disco", hidden_dim=16, queue=20)


@pytest.fixture
def whole_disco(config, store) -> TrainConfig:
    """Both views in a step, with a copy that moves fast."""
    return replace(
        config,
        targets=WithCopy(Cached(store.path), copy_momentum=0.7),
        objective=DISCO,
        pairing=PairingConfig("same", 2),
    )


def test_a_run_in_two_halves_is_the_whole_run(whole_disco, tmp_path):
    """Stopped in the middle of its second epoch."""
    whole_disco = replace(whole_disco, epochs=2)
    halves = replace(whole_disco, out=tmp_path / "halves")

    def stop(line: dict, total: int) -> None:
        if line["step"] == 2 * STEPS_PER_EPOCH - 1:
            raise KeyboardInterrupt

    train_student(whole_disco)
    with pytest.raises(KeyboardInterrupt):
        train_student(halves, TrainProgress(log=stop))
    train_student(halves)
    assert curve(whole_disco.out) == curve(halves.out)
    one, other = (torch.load(run.out / "checkpoint.pt", weights_only=True)["state"] for run in (whole_disco, halves))
    for part in ("model", "momentum"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert not torch.equal(one["model"]["objective.head.mlp.0.weight"], one["momentum"]["objective.head.mlp.0.weight"])
    exported = load_file(whole_disco.out / "student_average.safetensors")
    copied = {name: one["momentum"][f"backbone.{name}"] for name in exported}
    torch.testing.assert_close(exported, copied, rtol=0, atol=0)


def test_a_store_and_the_teacher_train_the_same(whole_disco, teacher, store, tmp_path):
    whole_disco = replace(whole_disco, epochs=2)
    train_student(whole_disco)
    live = WithCopy(online(teacher, store), copy_momentum=0.7)
    other = replace(whole_disco, targets=live, out=tmp_path / "online")
    train_student(other)
    losses = [[line[2] for line in curve(run.out)] for run in (whole_disco, other)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_the_objective_gets_the_teachers_rows_and_the_copys_of_the_same_crops(whole_disco, monkeypatch):
    """The copy moves after each step by its momentum, and no gradient reaches it or the teacher."""
    seen: list[PairTarget] = []
    take_step, weights, copies = Trainer.step, [], []

    def watched(trainer: Trainer, number: int, crops, target, pair_weights):
        seen.append(target)
        assert isinstance(target.moving, EmbeddingTarget)
        model, before = trainer.model, trainer.model.objective.head.mlp[0].weight.detach().clone()
        if number == 0:  # the copy is the student still: the keys are its own embedding
            copy = model.copy_for_targets()
            keys = copy.objective.embed(copy.features(crops[0]))
            torch.testing.assert_close(keys, target.moving.embedding, rtol=1e-5, atol=1e-6)
            copies.append(before)
        found = take_step(trainer, number, crops, target, pair_weights)
        after = model.objective.head.mlp[0].weight.detach().clone()
        copies.append(0.7 * copies[-1] + 0.3 * after)
        weights.append(after)
        return found

    monkeypatch.setattr(Trainer, "step", watched)
    config = replace(whole_disco, epochs=2)
    train_student(config)
    assert {tuple(target.moving.embedding.shape) for target in seen} == {(8, 2, 24)}
    assert {tuple(target.frozen.embedding.shape) for target in seen} == {(8, 2, 24)}
    assert not any(target.moving.embedding.requires_grad for target in seen)
    state = torch.load(config.out / "checkpoint.pt", weights_only=True)["state"]
    torch.testing.assert_close(state["momentum"]["objective.head.mlp.0.weight"], copies[-1], rtol=1e-5, atol=1e-6)
    told = json.loads((config.out / "config.json").read_text())["branch"]
    assert (told["kind"], told["copy_momentum"], told["momentum_end"]) == ("cached", 0.7, 0.7)


def test_the_momentum_is_the_papers_where_none_is_given(data, store):
    branch = WithCopy(Cached(store.path)).open(RunContext(data, CPU, objective=DISCO))
    assert branch.moving.settings.copy_momentum == branch.moving.settings.momentum_end == 0.999
    assert WithCopy(Cached(store.path)).open(RunContext(data, CPU)).usual_objective == "disco"
    assert branch.space.has_copy and not Cached(store.path).open(RunContext(data, CPU)).space.has_copy


def test_an_objective_without_a_use_for_the_copy_is_refused(whole_disco):
    for name in [name for name, kind in OBJECTIVES.items() if kind.beside_teacher is None]:
        message = f"`with_copy`: `objective` {name} has no use for a copy beside its teacher, it is for disco"
        refused(replace(whole_disco, objective=ObjectiveConfig(name)), message)


def test_what_else_is_refused(whole_disco, tmp_path):
    refused(
        replace(whole_disco, targets=WithCopy(Momentum()), objective=DISCO), "needs a teacher|`with_copy` puts a copy"
    )
    refused(replace(whole_disco, average=0.9), "leave `average` out")
    refused(
        replace(whole_disco, objective=replace(DISCO, queue=None, only_consistency=True)),
        "`only_consistency` leaves InfoNCE out",
    )
    with pytest.raises(MisuseError, match=r"`copy_momentum` is 1\.5, expected at most 1"):
        WithCopy(Cached(tmp_path), copy_momentum=1.5)


def test_the_copys_keys_may_be_shuffled_between_parts_of_the_batch(whole_disco, tmp_path):
    """As published, on 8 GPUs; the teacher's rows know nothing of it."""
    shuffled = replace(
        whole_disco, targets=replace(whole_disco.targets, split_batchnorm=2), out=tmp_path / "shuffled", epochs=1
    )
    train_student(shuffled)
    train_student(replace(whole_disco, epochs=1))
    assert json.loads((shuffled.out / "config.json").read_text())["branch"]["split_batchnorm"] == 2
    assert curve(shuffled.out)[0] != curve(whole_disco.out)[0]


def test_a_run_is_not_resumed_with_another_copy(whole_disco, store):
    train_student(replace(whole_disco, epochs=1))
    for targets in (WithCopy(Cached(store.path), copy_momentum=0.8), Cached(store.path)):
        with pytest.raises(MisuseError, match="copy_momentum"):
            train_student(replace(whole_disco, epochs=1, targets=targets))


# ==== on the command line ====


def run(data, out: Path, *options: object) -> str:
    tiny = ("--student", "test_resnet", "--image-size", 32, "--hidden-dim", 16, "--batch-size", 8, "--epochs", 1)
    tiny = (*tiny, "--warmup-epochs", 0, "--loader", "torch", "--workers", 1, "--device", "cpu")
    outcome = CliRunner().invoke(app, [*map(str, ("train-student", data.path, "--out", out, *tiny, *options))])
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return " ".join(outcome.output.split())


def test_with_copy_is_an_option_of_disco(data, store, tmp_path):
    text = run(data, tmp_path / "run", "--targets", store.path, "--with-copy", "--copy-momentum", 0.9)
    assert "--objective disco, since it has a use for the copy" in text
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (told["objective"]["name"], told["branch"]["copy_momentum"]) == ("disco", 0.9)
    assert (tmp_path / "run" / "student_average.safetensors").exists()
    run(data, tmp_path / "preset", "--preset", "disco", "--targets", store.path, "--with-copy", "--queue", 8)
    told = json.loads((tmp_path / "preset" / "config.json").read_text())
    assert (told["branch"]["copy_momentum"], told["objective"]["consistency_weight"]) == (0.999, 32.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--targets", "momentum", "--with-copy"),
            "--with-copy puts a copy beside a teacher; with momentum there is none",
        ),
        (("--copy-momentum", 0.9), "--copy-momentum is for --targets momentum or --with-copy"),
        (("--with-copy", "--objective", "dino"), "--with-copy: --objective dino has no use for a copy"),
        (("--with-copy", "--objective", "disco", "--only-consistency"), "--with-copy is for InfoNCE's keys"),
        (("--with-copy", "--prototypes", 12), "--prototypes is for --targets momentum"),
    ],
)
def test_what_the_command_refuses(data, store, tmp_path, options, message):
    targets = () if "--targets" in options else ("--targets", store.path)
    with pytest.raises(MisuseError, match=message):
        run(data, tmp_path / "run", *targets, *options)
    assert not (tmp_path / "run").exists()
