"""Several teachers at once: each store's targets reach a head of their own, and what does not go together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rob.cli import app
from rob.common.errors import MisuseError
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.student_train.as_teacher import export_teacher
from rob.student_train.config import PairingConfig
from rob.student_train.export.card import licence_of, teachers_of
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.ensemble import Ensemble
from rob.student_train.targets.joined import EnsembleTarget
from rob.student_train.targets.space import TargetSpace
from rob.student_train.train import train_student
from rob.student_train.train_config import ExportTeacherConfig, TrainConfig
from rob.student_train.trainer import Trainer
from support.tiny import TEACHER, tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, STEPS_PER_EPOCH, refused


@pytest.fixture(scope="module")
def other(data, tmp_path_factory) -> TargetStore:
    """Of another teacher, whose embedding has 256 numbers and no prototypes; three views an image."""
    folder = tmp_path_factory.mktemp("other")
    return tiny_store(folder / "other.zarr", data, tiny_teacher_checkpoint(folder, seed=1), views=3, loader=LOADER)


@pytest.fixture
def ensemble(config, store, other) -> TrainConfig:
    """Both views of both stores in a step, the first three times as heavy."""
    targets = Ensemble((Cached(store.path), Cached(other.path)), (3.0, 1.0))
    return replace(config, targets=targets, objective=None, pairing=PairingConfig("same", 2), epochs=2)


def test_every_head_gets_its_own_teachers_targets_of_the_same_views(ensemble, store, other, monkeypatch):
    seen: list[EnsembleTarget] = []
    take_step = Trainer.step

    def watched(trainer: Trainer, number: int, crops, target, pair_weights):
        seen.append(target)
        return take_step(trainer, number, crops, target, pair_weights)

    monkeypatch.setattr(Trainer, "step", watched)
    train_student(ensemble)
    stored = [decode(s.encoding, s.read(0, 24))["embedding"] for s in (store, other)]
    for number in range(0, len(seen), STEPS_PER_EPOCH):
        epoch = [t.members for t in seen[number : number + STEPS_PER_EPOCH]]
        first, second = (torch.cat([m[i].embedding for m in epoch]).float() for i in (0, 1))  # type: ignore[union-attr]
        views = [(number // STEPS_PER_EPOCH * 2 + v) % 2 for v in (0, 1)]  # the smaller store's, which rotate
        mine = stored[0][:, views].float()
        order = torch.cdist(first.flatten(1), mine.flatten(1)).argmin(1)
        assert sorted(order.tolist()) == list(range(24))
        torch.testing.assert_close(first, mine[order])
        torch.testing.assert_close(second, stored[1][:, views].float()[order])
    settings = json.loads((ensemble.out / "config.json").read_text())
    assert settings["targets"] == [str(store.path), str(other.path)]
    assert settings["branch"]["shares"] == [0.75, 0.25]
    assert (teachers := teachers_of(settings)) == [TEACHER, TEACHER], "a model card names all"
    assert licence_of(teachers, {TEACHER: "MIT"}.get) == f"{TEACHER}: MIT; {TEACHER}: MIT"
    assert settings["objective"]["name"] == "embedding", "one of the stores has no prototypes"
    model = torch.load(ensemble.out / "checkpoint.pt", weights_only=True)["state"]["model"]
    heads = [
        [t for n, t in model.items() if n.startswith(f"objective.members.{i}.head") and t.ndim == 2] for i in (0, 1)
    ]
    assert [layers[-1].shape[0] for layers in heads] == [24, 256]
    with pytest.raises(MisuseError, match="a head for each of 2 teachers"):
        export_teacher(ExportTeacherConfig(ensemble.out, ensemble.out / "teacher.safetensors"))


@pytest.mark.parametrize("name", ["embedding", "dino", "moco"])
def test_the_loss_is_the_weighted_sum_of_what_each_teacher_asks(name):
    """Against the objectives alone, with the same heads, gradient too."""
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(k, d), dim=1) for k, d in ((12, 8), (20, 6))]
    spaces = [TargetSpace(p.shape[1], len(p), True, 0.1, prototypes=p) for p in rows]
    targets = [
        EmbeddingTarget(torch.nn.functional.normalize(torch.randn(4, 2, s.dim), dim=-1), s.prototypes) for s in spaces
    ]
    shares = (0.25, 0.75)
    config = ObjectiveConfig(name, hidden_dim=16)
    joint = build_objective(config, 10, replace(spaces[0], members=tuple(zip(shares, spaces, strict=True))), 2, 64)
    alone = [build_objective(config, 10, space, 2, 64) for space in spaces]
    for number, objective in enumerate(alone):
        prefix = f"members.{number}."
        own = {n.removeprefix(prefix): t for n, t in joint.state_dict().items() if n.startswith(prefix)}
        objective.load_state_dict(own)
    features = torch.randn(4, 3, 10, requires_grad=True)
    weights = torch.full((3, 2), 1 / 6)
    found = joint(features, EnsembleTarget(tuple(targets)), weights)
    expected = sum(s * o(features, t, weights) for s, o, t in zip(shares, alone, targets, strict=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in (found, expected)))
    assert len(joint.prototype_weights) == sum(len(o.prototype_weights) for o in alone)


def test_stores_of_other_views_are_refused(ensemble, data, store, other, teacher, tmp_path):
    of_seed = tiny_store(tmp_path / "seed.zarr", data, teacher, seed=1, loader=LOADER)
    logits = tiny_store(tmp_path / "topk.zarr", data, teacher, encoding=Encoding("topk", k=4), loader=LOADER)
    for stores, weights, sentence in (
        ((store, of_seed), (), "holds views of another seed"),
        ((store, store), (), "is there twice"),
        ((store, other), (1.0,), "1 weights for 2 stores"),
        ((store, other), (1.0, 0.0), "a weight is above 0"),
        ((store, other), (1.0, float("nan")), "a weight is above 0"),
        ((store, other), (1.0, float("inf")), "a weight is above 0"),
        ((other, logits), (), "the store holds logits"),
    ):
        with pytest.raises(MisuseError, match=sentence):
            targets = Ensemble(tuple(Cached(s.path) for s in stores), weights)
            train_student(replace(ensemble, targets=targets))
        assert not ensemble.out.exists()
    refused(replace(ensemble, objective=ObjectiveConfig("patch")), "patch")


def test_the_command_takes_several_stores(data, store, other, tmp_path):
    def train(*words: str):
        out = tmp_path / "run"
        usual = [
            "--student",
            "test_resnet",
            "--image-size",
            "32",
            "--epochs",
            "1",
            "--batch-size",
            "8",
            "--loader",
            "torch",
        ]
        return CliRunner().invoke(app, ["train-student", str(data.path), "--out", str(out), *usual, *words])

    several = ("--targets", str(store.path), "--targets", str(other.path))
    for words, sentence in (
        (("--targets", str(store.path), "--targets", "momentum"), "momentum is none: give it alone"),
        (("--targets", str(store.path), "--targets-weight", "2"), "is for several --targets"),
        ((*several, "--targets-weight", "2"), "1 weights for 2 stores"),
        ((*several, "--objective", "disco", "--with-copy"), "beside one teacher, and --targets are 2: give one"),
    ):
        result = train(*words)
        assert isinstance(result.exception, MisuseError) or result.exit_code, result.output
        assert sentence in " ".join(f"{result.exception} {result.output}".split())
    result = train(*several, "--targets-weight", "2", "--targets-weight", "1")
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["targets"] == [str(store.path), str(other.path)]
    assert settings["branch"]["shares"] == pytest.approx([2 / 3, 1 / 3])
    assert Path(tmp_path / "run" / "student.safetensors").is_file()
