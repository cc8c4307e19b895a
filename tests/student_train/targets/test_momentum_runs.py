"""Runs without a teacher: resumed, refused, exported, and of one objective."""

import json
import signal
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.ranks import ALONE
from rob.common.views.batch import ViewSet
from rob.common.views.loader import LoaderConfig, ViewLoader
from rob.common.views.recipes import get_recipe
from rob.student_train.checkpoint import load_student
from rob.student_train.crops import Preparation
from rob.student_train.objectives import OBJECTIVES, CopySettings, ObjectiveConfig
from rob.student_train.objectives.centre import RunningCentre
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.student_config import StudentConfig
from rob.student_train.students import describe_student
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.momentum import UNBOUNDED, Momentum, MomentumTargets
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, epoch_order, train_student
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from support.tiny import tiny_beton

CPU = torch.device("cpu")
PROTOTYPES = 12
PUBLISHED = {name: objective.published for name, objective in OBJECTIVES.items() if objective.published}


@dataclass(frozen=True)
class Few(Momentum):
    """Twelve prototypes where there are some; keeps what it opened."""

    opened: list[MomentumTargets] = field(default_factory=list)

    def settings(self, objective: str) -> CopySettings:
        settings = super().settings(objective)
        return replace(settings, prototypes=min(12, settings.prototypes))

    def open(self, run: RunContext) -> MomentumTargets:
        self.opened.append(super().open(run))
        return self.opened[-1]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        data=tiny_beton(tmp_path, 24).path,
        out=tmp_path / "run",
        student=StudentConfig("test_resnet", 32, small_images=True),
        targets=Few(),
        pairing=PairingConfig("cross", step_targets=2, num_local=1, fresh=False),
        optimiser=OptimiserConfig(warmup_epochs=0),
        epochs=4,
        device="cpu",
        loader=LoaderConfig("torch", batch_size=8, workers=1),
        log_every=1,
    )


@pytest.mark.parametrize("name", ["dino", "ibot", "swav", "moco"])
def test_a_run_in_two_halves_is_the_whole_run(config, name, tmp_path):
    """Stopped in the middle of its second epoch."""
    objective = ObjectiveConfig(
        name, hidden_dim=16, **({"bottleneck": 10, "centre_targets": "running"} if name == "dino" else {})
    )
    config = replace(config, objective=objective, epochs=2)
    train_student(config)

    def stop(line: dict, total: int) -> None:
        if line["step"] == 5:
            raise KeyboardInterrupt

    halves = replace(config, out=tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        train_student(halves, TrainProgress(log=stop))
    train_student(halves)
    one, other = (load_file(run.out / "student.safetensors") for run in (config, halves))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    one, other = (torch.load(run.out / "checkpoint.pt", weights_only=True)["state"] for run in (config, halves))
    assert ("momentum" in one) == (name != "swav")
    for part in {"model", "momentum"} & one.keys():
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_a_run_moves_the_copy_and_its_temperature_in_every_step(config, monkeypatch):
    """The EMA of the weights that a run went through, replayed from outside, is what it exports."""
    config = replace(config, objective=ObjectiveConfig("dino", hidden_dim=16, bottleneck=10))
    temps, weights = [], []
    take_step = Trainer.step

    def watched(trainer: Trainer, number: int, *rest):
        if not weights:
            weights.append(deepcopy(dict(trainer.model.backbone.named_parameters())))
        temps.append(trainer.objective.teacher_temp)
        found = take_step(trainer, number, *rest)
        weights.append(deepcopy(dict(trainer.model.backbone.named_parameters())))
        return found

    monkeypatch.setattr(Trainer, "step", watched)
    train_student(config)
    (branch,) = config.targets.opened
    steps_per_epoch = 24 // 8
    assert temps == [branch.teacher_temp(step // steps_per_epoch) for step in range(4 * steps_per_epoch)]
    assert len(set(temps)) == 4
    copy = weights[0]
    for step, after in enumerate(weights[1:]):
        momentum = branch.momentum(step)
        copy = {name: momentum * slow + (1 - momentum) * after[name] for name, slow in copy.items()}
    average = dict(load_student(config.out / "student_average.safetensors")[0].named_parameters())
    torch.testing.assert_close(average, {name: value.detach() for name, value in copy.items()}, rtol=0, atol=1e-6)
    assert (branch.freeze_prototypes, type(branch.model.objective.centres[0])) == (1, RunningCentre)


def test_ctrl_c_while_the_copy_makes_its_targets_waits_for_the_step(config, monkeypatch, tmp_path):
    """Or the copy's BatchNorm would have seen the batch, and would see it again in the run that goes on."""
    config = replace(config, objective=ObjectiveConfig("dino", hidden_dim=16, bottleneck=10), epochs=2)
    train_student(config)
    halves, embed, calls = replace(config, out=tmp_path / "halves"), MomentumTargets.embed, []

    def interrupted(branch: MomentumTargets, crops: Tensor):
        target = embed(branch, crops)
        calls.append(True)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return target

    monkeypatch.setattr(MomentumTargets, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_student(halves)
    assert len(calls) == 5
    train_student(halves)
    for name in ("student.safetensors", "student_average.safetensors"):
        one, other = (load_file(run.out / name) for run in (config, halves))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_needs_a_teacher_or_other_views_is_refused(config):
    for name in OBJECTIVES.keys() - PUBLISHED.keys():
        with pytest.raises(MisuseError, match=f"`objective` {name} needs a teacher"):
            train_student(replace(config, objective=ObjectiveConfig(name)))
    fresh = replace(config, objective=ObjectiveConfig("swav"), pairing=PairingConfig("cross", 2))
    with pytest.raises(MisuseError, match="`objective` swav makes its targets of the student's: leave it out"):
        train_student(fresh)
    config = replace(config, objective=ObjectiveConfig("moco"), pairing=PairingConfig("cross", 1, 1, False, None, 2))
    with pytest.raises(MisuseError, match="both branches see the same views: leave out `step_globals`, or use `fresh`"):
        train_student(config)
    vit = replace(config, student=StudentConfig("test_vit", 32), objective=ObjectiveConfig("ibot", head_norm=False))
    with pytest.raises(MisuseError, match="the student is shown others: leave out `fresh`, or `patch_weight` 0"):
        train_student(replace(vit, pairing=PairingConfig("cross", 1)))
    for pairing in ("same", "all"):
        config = replace(config, pairing=PairingConfig(pairing, 2))
        with pytest.raises(MisuseError, match="a view that meets itself has nothing to learn: leave out `pairing`"):
            train_student(config)
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["moco", "msn"])
def test_with_fresh_views_the_copy_sees_one_crop_and_the_student_another(config, name, monkeypatch):
    """MoCo's key and MSN's target are of a view that the student does not see; both are drawn and normalised alike."""
    seen: dict[str, list[Tensor]] = {"copy": [], "student": []}
    embed, take_step = MomentumTargets.embed, Trainer.step

    def embedded(branch: MomentumTargets, crops: Tensor):
        seen["copy"].append(crops.clone())
        return embed(branch, crops)

    def stepped(trainer: Trainer, number: int, images: list[Tensor], *rest):
        seen["student"].append(images[0].clone())
        return take_step(trainer, number, images, *rest)

    monkeypatch.setattr(MomentumTargets, "embed", embedded)
    monkeypatch.setattr(Trainer, "step", stepped)
    objective = ObjectiveConfig(name, hidden_dim=16, **({"queue": 6} if name == "moco" else {}))
    config = replace(config, objective=objective, epochs=1, student=replace(config.student, mean=(0.2, 0.5, 0.7)))
    train_student(replace(config, pairing=PairingConfig("cross", step_targets=1, num_local=1)))
    assert [crops.shape for crops in seen["copy"]] == [(8, 1, 3, 32, 32)] * 3
    (branch,) = config.targets.opened
    data = Beton(config.data)
    order = epoch_order(config, data.num_images, branch.window_blocks, 0, ALONE)
    loader = ViewLoader(data, branch.recipe, branch.seed, config.loader)
    info = describe_student(config.student)
    prepare = Preparation(branch.recipe, info.mean, info.std, CPU)
    ids = {"copy": 0, "student": UNBOUNDED}
    assert UNBOUNDED % len(get_recipe("dino").global_crops) != 0, "of the two kinds of crops each sees another"
    for who, view in ids.items():
        sets = (ViewSet((view,), 32),)
        expected = [prepare(batch, sets)[0].clone() for batch in loader.epoch(order, sets)]
        torch.testing.assert_close(seen[who], expected, rtol=0, atol=0)


def test_the_copy_is_exported_as_the_students_average(config):
    objective = ObjectiveConfig("dino", hidden_dim=16, bottleneck=10, centre_targets="running")
    config = replace(config, objective=objective, epochs=1)
    train_student(config)
    (branch,) = config.targets.opened
    average, info = load_student(config.out / "student_average.safetensors")
    torch.testing.assert_close(average.state_dict(), branch.copy.backbone.state_dict(), rtol=0, atol=0)
    assert info.name == "test_resnet"
    student, _ = load_student(config.out)
    assert not torch.equal(next(average.parameters()), next(student.parameters()))

    twice = replace(config, out=config.out.with_name("twice"), average=0.99)
    with pytest.raises(MisuseError, match="leave `average` out"):
        train_student(twice)
    assert not twice.out.exists()
    without_copy = replace(config, out=config.out.with_name("swav"), objective=ObjectiveConfig("swav", hidden_dim=16))
    train_student(without_copy)
    assert not (without_copy.out / "student_average.safetensors").exists()


def test_a_queue_that_never_serves_is_refused_before_anything_is_written(config):
    objective = ObjectiveConfig("swav", queue=6, bottleneck=10)
    asked = replace(config, objective=objective, epochs=15, out=config.out.with_name("swav"))
    with pytest.raises(
        MisuseError, match="begins to fill in epoch 15, and the last of `epochs` 15 is 14: leave `queue` out"
    ):
        train_student(asked)
    assert not asked.out.exists()


@pytest.mark.parametrize("name", [None, "dino", "swav"])
def test_the_targets_are_those_of_the_runs_own_settings(config, name):
    """No setting is given twice: the objective that is trained is the one whose paper the targets follow."""
    objective = None if name is None else ObjectiveConfig(name, hidden_dim=16, teacher_temp=0.03)
    config = replace(config, objective=objective, targets=Few(recipe=get_recipe("moco-v2")), seed=3, epochs=1)
    train_student(replace(config, pairing=None))
    told = json.loads((config.out / "config.json").read_text())
    assert told["objective"]["name"] == (name or "dino")
    settings = replace(PUBLISHED[name or "dino"], prototypes=12)
    assert told["branch"] == {
        **asdict(settings),
        "kind": "momentum",
        "seed": 3,
        "teacher_temp": settings.teacher_temp if name is None else 0.03,
    }
    (branch,) = config.targets.opened
    assert (branch.device, branch.precision, branch.seed) == (CPU, "fp32", 3)
    assert branch.model.objective.centre_targets is None
    assert (told["pairing"]["pairing"], told["pairing"]["fresh"], told["targets"]) == ("cross", False, "momentum")
