"""Targets that no longer tell images apart: measured, logged, and told once, when each kind is forced."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.collapse import FIELDS, GRACE, PATIENCE, CollapseWatch, entropies, remedies, spread
from rob.student_train.kernels.target import DenseTarget, EmbeddingTarget, TopKTarget
from rob.student_train.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.momentum import Momentum, MomentumTargets, unread_options
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.targets.space import TargetSpace
from rob.student_train.train import TrainConfig, TrainProgress, train_student
from support.tiny import tiny_beton

K = 12
ADVICE = remedies("momentum", None, "none", 0.0)

# ==== the measures ====


def test_entropies_are_those_of_the_softmax():
    embedding = F.normalize(torch.randn(50, 2, 8, dtype=torch.float64), dim=-1)
    prototypes, centre = torch.randn(K, 8, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    q = torch.softmax((embedding @ prototypes.T - centre) / 0.2, dim=-1).flatten(0, 1)
    expected = {"target_entropy": -(q * q.log()).sum(1).mean()}
    expected["mean_target_entropy"] = -(q.mean(0) * q.mean(0).log()).sum()
    for target in (EmbeddingTarget(embedding, prototypes), DenseTarget(embedding @ prototypes.T)):
        torch.testing.assert_close(entropies(target, 0.2, centre), expected, check_dtype=False)


def test_entropies_at_their_bounds():
    alike = entropies(DenseTarget(torch.zeros(4, 1, K)), 0.1, None)
    assert [float(value) for value in alike.values()] == pytest.approx([math.log(K)] * 2)
    sharp = entropies(DenseTarget(100 * torch.eye(K).unsqueeze(1)), 0.1, None)
    assert [float(value) for value in sharp.values()] == pytest.approx([0, math.log(K)], abs=1e-5)


def test_the_top_k_logits_of_a_store_tell_nothing():
    target = TopKTarget(
        torch.zeros(2, 1, 1, dtype=torch.long), torch.zeros(2, 1, 1), torch.zeros(2, 1, 2), (0.04, 0.1), K
    )
    assert entropies(target, 0.1, None) == {}


def test_spread_is_0_for_one_direction_and_1_for_all():
    assert float(spread(torch.ones(6, 2, 4) / 2)["target_std"]) == pytest.approx(0, abs=1e-6)
    assert float(spread(torch.cat([torch.eye(4), -torch.eye(4)]).unsqueeze(1))["target_std"]) == pytest.approx(1)


def test_the_watch_is_patient_and_tells_once():
    total = 100
    watch = CollapseWatch(K, total, ADVICE)
    first = int(GRACE * total) + 1
    told = []
    for step in range(1, total + 1):
        healthy = step == first + 1
        line = {"step": step, "target_entropy": 0.5 if healthy else math.log(K), "mean_target_entropy": math.log(K)}
        if watch.look(line):
            told.append(step)
    assert told == [first + 1 + PATIENCE]


@pytest.mark.parametrize("kind", ["cached", "online", "momentum"])
@pytest.mark.parametrize("name", ["dino", "ibot", "swav", "msn"])
def test_remedies_are_options_that_the_run_takes_and_does_not_have(name, kind):
    usual = OBJECTIVES[name]
    advice = " ".join(remedies(kind, None, usual.sinkhorn, usual.mean_entropy).values())
    space = TargetSpace(8, K, True, 0.04, mean_logits=torch.zeros(K) if kind == "cached" else None)
    asked = dict(re.findall(r"`(centre_targets|sinkhorn|mean_entropy)` (\w+)", advice))
    for option, value in asked.items():
        value = float(value) if option == "mean_entropy" else value
        assert {"sinkhorn": usual.sinkhorn, "mean_entropy": usual.mean_entropy}.get(option, "none") != value
        build_objective(ObjectiveConfig(name, **{option: value}), 16, space)  # refuses what it does not take
    centred = " ".join(remedies(kind, "checkpoint", usual.sinkhorn, usual.mean_entropy).values())
    assert "calibration" not in centred
    assert ("in place of `centre_targets` checkpoint" in centred) == ("`sinkhorn` batch" in centred)
    options = set(re.findall(r"`([a-z_]+)`", advice))
    if kind == "momentum":
        assert not options & unread_options(name).keys() - {"copy_momentum"}
    else:
        assert not options & {"warmup_teacher_temp_epochs", "prototypes", "freeze_prototypes", "copy_momentum", "lr"}


@pytest.mark.parametrize(("share", "warns"), [(0.98, True), (0.9, False)])
def test_a_teacher_too_warm_settles_just_below_uniform(share, warns):
    """As seen with temperature .07 after 800 steps on CIFAR-10."""
    watch = CollapseWatch(K, 100, ADVICE)
    line = {"target_entropy": share * math.log(K), "mean_target_entropy": math.log(K)}
    assert any(watch.look(line | {"step": step}) for step in range(1, 101)) == warns


# ==== forced, in a run ====


class ForcedTargets(MomentumTargets):
    """Of a copy that says ``rows`` (n, D) of the batch's views in turn, against ``known`` prototypes (K, D)."""

    rows: Tensor
    known: Tensor | None

    def embed(self, crops: Tensor) -> EmbeddingTarget:
        count = len(crops) * crops.shape[1]
        rows = self.rows[torch.arange(count) % len(self.rows)]
        return EmbeddingTarget(rows.unflatten(0, crops.shape[:2]), self.known)


@dataclass(frozen=True)
class Forced(Momentum):
    rows: Tensor = field(kw_only=True)
    known: Tensor | None = field(kw_only=True)

    def open(self, run: RunContext) -> ForcedTargets:
        branch = ForcedTargets(self.recipe, self.settings(run.objective.name), run.objective, run)
        branch.rows, branch.known = self.rows, self.known
        return branch


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        data=tiny_beton(tmp_path, 16).path,
        out=tmp_path / "run",
        student=StudentConfig("test_resnet", 32, small_images=True),
        targets=Momentum(),
        pairing=PairingConfig("cross", step_targets=2, fresh=False),
        optimiser=OptimiserConfig(warmup_epochs=0),
        epochs=5,
        device="cpu",
        loader=LoaderConfig("torch", batch_size=8, workers=1),
        log_every=1,
    )


def trained(config: TrainConfig, rows: Tensor, known: Tensor | None, objective: ObjectiveConfig) -> list[str]:
    """The notes of a run with these targets."""
    prototypes, warmup = (None, None) if known is None else (len(known), 0)
    forced = Forced(get_recipe("dino"), prototypes, None, warmup, rows=rows, known=known)
    notes: list[str] = []
    train_student(replace(config, objective=objective, targets=forced), TrainProgress(note=notes.append))
    return notes


def logged(config: TrainConfig) -> list[dict]:
    return [json.loads(line) for line in Path(config.out / "metrics.jsonl").read_text().splitlines()]


PROTOTYPES = torch.eye(K, 16)
DINO = ObjectiveConfig("dino", teacher_temp=0.04, hidden_dim=16, bottleneck=16)
MOCO = ObjectiveConfig("moco", hidden_dim=16, queue=8)
ONE = PROTOTYPES[:1]
NONE = F.normalize(torch.eye(16)[K:].sum(0, keepdim=True), dim=1)
"""At right angles to all prototypes."""
KEYS = torch.eye(16, 128)


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        (
            DINO,
            ONE,
            r"nearly all images at one prototype \(target_entropy .*, mean_target_entropy .*\)\. .*`sinkhorn` batch",
        ),
        (DINO, NONE, r"all prototypes nearly alike .*\. Sharpen them: a lower `teacher_temp`"),
        (MOCO, KEYS[:1], r"nearly the same embedding for every image \(target_std .*\)\. Lower `lr`"),
    ],
    ids=["one prototype", "all alike", "one embedding"],
)
def test_each_collapse_is_told_once_with_its_remedy(config, objective, rows, message):
    prototypes = PROTOTYPES if objective is DINO else None
    (note,) = trained(config, rows, prototypes, objective)
    assert re.match(rf"step \d+: the targets near collapse, with {message}", note), note
    assert [line["warning"] for line in logged(config) if "warning" in line] == [note]
    assert f"\n{note}\n" in (config.out / "train.log").read_text()


def test_targets_that_differ_are_logged_without_a_warning(config):
    assert trained(config, PROTOTYPES, PROTOTYPES, DINO) == []
    lines = logged(config)
    assert len(lines) == 10
    for line in lines:
        assert line["target_entropy"] == pytest.approx(0, abs=1e-4)  # e^(-1/.04) is left to the others
        assert 2 < line["mean_target_entropy"] <= math.log(K) + 1e-4
    assert ", mean target entropy " in (config.out / "train.log").read_text()

    other = replace(config, out=config.out.with_name("moco"))
    assert trained(other, KEYS, None, MOCO) == []
    assert all(line["target_std"] == pytest.approx(math.sqrt(15 / 16), abs=0.01) for line in logged(other))


def test_only_the_steps_of_a_line_are_looked_at(config, monkeypatch):
    looks = []
    monkeypatch.setattr(
        "rob.student_train.objectives.prototypes.entropies",
        lambda *_: looks.append(1) or dict.fromkeys(FIELDS[:2], torch.ones(())),
    )
    trained(replace(config, log_every=4), PROTOTYPES, PROTOTYPES, DINO)
    assert [line["step"] for line in logged(config)] == [4, 8, 10]
    assert len(looks) == 3
