"""Training: the cache changes nothing, an interruption changes nothing, and what cannot go on says so and loses nothing."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig, geometry
from rob.common.views.recipes import Recipe, get_recipe
from rob.student_train.checkpoint import load_student
from rob.student_train.crops import crop_sets
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.objectives.embedding import EmbeddingObjective
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.run_folder import RunFolder
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online, OnlineTargets
from rob.student_train.targets.pairing import PairingConfig, plan_views
from rob.student_train.targets.space import TargetSpace
from rob.student_train.train import TrainProgress, TrainResult, train_student
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

CPU = torch.device("cpu")
LOADER = LoaderConfig("torch", batch_size=8, workers=1)
STEPS_PER_EPOCH = 3
STUDENT = StudentConfig("test_resnet", 32)
NO_WARM_UP = OptimiserConfig(warmup_epochs=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    """24 images: three batches."""
    return tiny_beton(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> TeacherConfig:
    """With a head of 24 dimensions and 10 prototypes."""
    return tiny_teacher_checkpoint(tmp_path_factory.mktemp("teacher"), prototypes=10)


@pytest.fixture(scope="module")
def store(data, teacher, tmp_path_factory) -> TargetStore:
    """Two views an image, embeddings in single precision. Not to be changed."""
    path = tmp_path_factory.mktemp("store") / "targets.zarr"
    return tiny_store(path, data, teacher, encoding=Encoding("embedding", "float32"), loader=LOADER)


@pytest.fixture
def config(data, store, tmp_path) -> TrainConfig:
    """Four epochs of three steps, one target view a step, a line a step."""
    return TrainConfig(
        data=data.path,
        out=tmp_path / "run",
        student=STUDENT,
        targets=Cached(store.path),
        objective=ObjectiveConfig(hidden_dim=32, bottleneck=16),
        pairing=PairingConfig("same", step_targets=1),
        optimiser=NO_WARM_UP,
        epochs=4,
        device="cpu",
        loader=LOADER,
        log_every=1,
    )


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple]:
    """All of the log but the times."""
    return [tuple(line[name] for name in ("step", "epoch", "loss", "gradient_norm", "lr")) for line in log_of(out)]


def online(teacher: TeacherConfig, store: TargetStore, recipe: Recipe | None = None) -> Online:
    """What makes on the spot what ``store`` holds, of the same seed."""
    manifest = store.manifest
    recipe = recipe or Recipe.from_dict(manifest.recipe)
    return Online(load_teacher(teacher), recipe, len(manifest.view_ids), manifest.view_size)


class OfOtherViews(Online):
    def open(self, run: RunContext) -> OnlineTargets:
        return super().open(replace(run, seed=run.seed + 1))


# ==== the cache changes nothing ====


@pytest.mark.parametrize(
    ("objective", "pairing"),
    [
        ("embedding", PairingConfig("same", step_targets=2)),
        ("dino", PairingConfig("cross", step_targets=2, num_local=1)),
        ("dino", PairingConfig("cross", step_targets=2, fresh=False)),
        ("ibot", PairingConfig("all", step_targets=2)),
        ("swav", PairingConfig("cross", step_targets=2)),
        ("msn", PairingConfig("cross", step_targets=1, num_local=2)),
        ("moco", PairingConfig("cross", step_targets=2)),
        ("disco", PairingConfig("same", step_targets=2)),
    ],
)
def test_from_the_cache_the_curve_is_that_of_the_online_teacher(config, teacher, store, tmp_path, objective, pairing):
    config = replace(config, objective=replace(config.objective, name=objective), pairing=pairing, epochs=2)
    cached, on_the_spot = (
        replace(config, out=tmp_path / "cached"),
        replace(config, out=tmp_path / "online", targets=online(teacher, store)),
    )
    train_student(cached)
    train_student(on_the_spot)
    losses, expected = (torch.tensor(curve(run.out))[:, 2:] for run in (cached, on_the_spot))
    assert len(losses) == 6
    torch.testing.assert_close(losses[:3], expected[:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-6)  # rounding grows with the steps


def test_the_fast_loader_agrees_with_the_online_teacher_too(config, data, teacher, tmp_path):
    loader = LoaderConfig("auto", batch_size=8, workers=1)
    encoding = Encoding("embedding", "float32")
    fast = tiny_store(tmp_path / "targets.zarr", data, teacher, encoding=encoding, loader=loader)
    config = replace(config, loader=loader, epochs=1, pairing=PairingConfig("same", step_targets=2))
    train_student(replace(config, out=tmp_path / "cached", targets=Cached(fast.path)))
    train_student(replace(config, out=tmp_path / "online", targets=online(teacher, fast)))
    losses, expected = (torch.tensor(curve(tmp_path / name))[:, 2:] for name in ("cached", "online"))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_other_views_are_another_curve(config, teacher, store, tmp_path):
    """What the comparison above would show if the two branches' views were not the same."""
    config = replace(config, epochs=1)
    train_student(config)
    same = online(teacher, store)
    other_views = OfOtherViews(same.teacher, same.recipe, same.views, same.view_size)
    train_student(replace(config, out=tmp_path / "other", targets=other_views))
    losses, other = (torch.tensor(curve(out))[:, 2] for out in (config.out, tmp_path / "other"))
    assert (losses / other - 1).abs().max() > 1e-3


def test_pixels_of_two_loaders_are_a_note(config, data, teacher, tmp_path):
    fast = LoaderConfig("auto", batch_size=8, workers=1)
    if geometry(fast) == geometry(LOADER):
        pytest.skip("ffcv is not installed here: there is one loader")
    other = tiny_store(tmp_path / "targets.zarr", data, teacher, loader=fast)
    notes: list[str] = []
    train_student(replace(config, targets=Cached(other.path), epochs=1), progress=TrainProgress(note=notes.append))
    assert len(notes) == 1
    assert "use the same `loader`" in notes[0]


# ==== what comes out ====


def test_the_run_folder_holds_what_the_design_says(config, data):
    result = train_student(replace(config, epochs=2, average=0.9))
    out = config.out
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "train.log", "checkpoint.pt", "student.safetensors", ".lock"),
        "student_average.safetensors",
    }
    assert result.weights == out / "student.safetensors"
    assert result.steps == 6
    assert result.loss == log_of(out)[-1]["loss"]

    timm.create_model(STUDENT.name, num_classes=0).load_state_dict(load_file(out / "student.safetensors"))
    backbone, info = load_student(out)
    assert (info.name, info.image_size) == (STUDENT.name, 32)
    assert not backbone.training
    average, _ = load_student(out / "student_average.safetensors")
    assert not torch.equal(average.conv1[0].weight, backbone.conv1[0].weight)

    settings = json.loads((out / "config.json").read_text())
    assert settings["student"]["name"] == STUDENT.name
    assert settings["recipe"]["name"] == "dino"
    assert settings["data_fingerprint"] == data.manifest.fingerprint
    assert settings["branch"]["teacher"] == "test_efficientnet_gn"
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log_of(out)] == [0, 0, 0, 1, 1, 1]
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in log_of(out))
    assert (out / "train.log").read_text().count("\n") == 6


def test_the_student_learns_what_the_teacher_says(config):
    train_student(replace(config, epochs=12, optimiser=OptimiserConfig(lr=0.05, warmup_epochs=1)))
    losses = [line["loss"] for line in log_of(config.out)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


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
        {"name": "disco", "queue": 20},
        {"name": "msn"},
    ],
    ids=lambda settings: settings["name"],
)
def test_what_an_objective_gathers_is_resumed_too(config, tmp_path, settings):
    """A queue in the middle of its ring, or a running centre, three steps into the second epoch's end."""
    pairing = PairingConfig("same" if settings["name"] == "disco" else "cross", step_targets=2)
    config = replace(config, objective=replace(config.objective, **settings), pairing=pairing)
    halves = replace(config, out=tmp_path / "halves")
    train_student(config)
    with pytest.raises(KeyboardInterrupt):
        train_student(halves, progress=interrupt_at(2 * STEPS_PER_EPOCH - 1))
    train_student(halves)
    assert curve(config.out) == curve(halves.out)
    assert len(curve(config.out)) == 4 * STEPS_PER_EPOCH
    one, other = (torch.load(out / "checkpoint.pt", weights_only=True)["state"] for out in (config.out, halves.out))
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)


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


def killed_in_step(number: int) -> Callable:
    original = Trainer.step

    def step(self: Trainer, at: int, *arguments: Any) -> tuple[Tensor, float]:
        if at + 1 == number:
            raise SystemExit
        return original(self, at, *arguments)

    return step


def test_a_finished_run_is_not_run_again(config, monkeypatch):
    first = train_student(replace(config, epochs=1))
    weights = load_file(first.weights)
    monkeypatch.setattr(Trainer, "step", killed_in_step(1))
    second = train_student(replace(config, epochs=1))
    assert second == first
    torch.testing.assert_close(load_file(second.weights), weights, rtol=0, atol=0)


def test_another_teacher_store_or_setting_is_refused_on_resume(config, data, teacher, store, tmp_path):
    config = replace(config, epochs=1)
    train_student(config)
    other = tiny_teacher_checkpoint(tmp_path, seed=1, prototypes=10)
    other_store = tiny_store(tmp_path / "other.zarr", data, other, loader=LOADER)
    for changed, field in [
        (replace(config, epochs=2), "epochs = 1, this run has epochs = 2"),
        (replace(config, seed=1), "seed = 0, this run has seed = 1"),
        (replace(config, optimiser=replace(NO_WARM_UP, lr=1e-3)), r"optimiser\.lr = 0\.0005"),
        (replace(config, loader=replace(LOADER, batch_size=4)), "batch_size = 8, this run has batch_size = 4"),
        (replace(config, targets=Cached(other_store.path)), r"branch\.weights_hash = "),
    ]:
        with pytest.raises(MisuseError, match=field):
            train_student(changed)
    with pytest.raises(MisuseError, match=r"branch\.kind = cached, this run has branch\.kind = online"):
        train_student(replace(config, targets=online(teacher, store)))
    train_student(replace(config, loader=replace(LOADER, workers=2), log_every=5))  # these move no weight


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


def test_the_teachers_batch_norm_stays_as_it_is_whatever_the_students_mode(config, data, tmp_path):
    """DisCo's published code calls train() on a module that holds the teacher too."""
    weights = tmp_path / "teacher.safetensors"
    model = timm.create_model("test_resnet", num_classes=0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after a training: batch statistics would be far from these
            module.running_mean += 0.3
    save_file(model.state_dict(), weights)
    frozen = load_teacher(TeacherConfig("test_resnet", weights))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    live = Online(frozen, get_recipe("moco-v2"), views=2, view_size=32)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    said = frozen(images)

    class Both(torch.nn.Module):
        """What a module is that holds student and teacher."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher = frozen

    Both().train()
    disco = replace(config.objective, name="disco", queue=20)
    train_student(replace(config, targets=live, objective=disco, pairing=PairingConfig("same"), epochs=1))
    assert not any(module.training for module in frozen.modules())
    torch.testing.assert_close(dict(frozen.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(frozen(images), said, rtol=0, atol=0)
    alone = torch.cat(
        [frozen(image[None]) for image in images]
    )  # of batch statistics each image would say another thing
    torch.testing.assert_close(alone, said, rtol=1e-4, atol=1e-5)


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


# ==== every way to take a step ====


@pytest.mark.parametrize(
    "changes",
    [
        {"average": 0.5},
        {"clip_grad": 0.0},
        {"optimiser": OptimiserConfig("sgd", warmup_epochs=0)},
        {"optimiser": OptimiserConfig("lars", weight_decay=1e-6, warmup_epochs=0)},
        {"optimiser": OptimiserConfig(warmup_epochs=0.5, weight_decay_end=0.4)},
        {"precision": "bf16"},
        {"pairing": PairingConfig("all", step_targets=2)},
        {"targets": {"cache_in_memory": True}},
        {"student": StudentConfig("test_vit", 32, small_images=True)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:40],
)
def test_variants_take_steps(config, changes):
    if "targets" in changes:
        changes = {"targets": replace(config.targets, **changes["targets"])}
    before = build(replace(config, **changes)).model.backbone.state_dict()
    train_student(replace(config, **changes, epochs=1))
    after = load_file(config.out / "student.safetensors")
    assert all(torch.isfinite(values).all() for values in after.values() if values.is_floating_point())
    assert all(after[name].dtype == values.dtype for name, values in before.items())
    moved = [name for name, values in before.items() if not torch.equal(values, after[name])]
    assert len(moved) > 0.9 * len(before)


def build(config: TrainConfig, space: TargetSpace | None = None) -> Trainer:
    return Trainer(config, space or TargetSpace(24, 10, True, 0.05), STEPS_PER_EPOCH, CPU)


def some_step(config: TrainConfig, space: TargetSpace | None = None) -> tuple[Trainer, Tensor]:
    """A trainer after one step on noise, and that step's (loss, gradient norm)."""
    trainer = build(config, space)
    random = torch.Generator().manual_seed(0)
    crops = [torch.randn(4, 1, 3, config.student.image_size, config.student.image_size, generator=random)]
    target = EmbeddingTarget(F.normalize(torch.randn(4, 1, 24, generator=random), dim=-1))
    health, _ = trainer.step(0, crops, target, torch.ones(1, 1))
    return trainer, health


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0"]
)
def test_every_student_of_the_readme_takes_a_step(config, name):
    trainer, health = some_step(replace(config, student=StudentConfig(name, 32, small_images=True)))
    assert torch.isfinite(health).all()
    assert health[1] > 0
    without = [
        name for name, p in trainer.model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert without == []


def gradient_norm(trainer: Trainer) -> float:
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat(gradients).norm().item()


def test_clipping_bounds_the_gradient_and_the_log_has_what_it_was(config):
    unbounded, health = some_step(replace(config, clip_grad=0.0))
    norm = gradient_norm(unbounded)
    assert health[1].item() == pytest.approx(norm, rel=1e-4)
    clipped, health = some_step(replace(config, clip_grad=norm / 4))
    assert health[1].item() == pytest.approx(norm, rel=1e-4)
    assert gradient_norm(clipped) == pytest.approx(norm / 4, rel=1e-3)


def test_bf16_is_the_same_training_in_fewer_bits(config):
    (_, exact), (_, coarse) = (some_step(replace(config, precision=precision)) for precision in ("fp32", "bf16"))
    assert coarse[0].item() == pytest.approx(exact[0].item(), rel=0.02)
    assert coarse[0] != exact[0]


def test_the_average_follows_the_student_at_its_decay(config):
    trainer, _ = some_step(replace(config, average=0.9))
    trainer_without, _ = some_step(config)
    start = build(config).model.backbone.conv1[0].weight
    now = trainer.model.backbone.conv1[0].weight
    assert torch.equal(now, trainer_without.model.backbone.conv1[0].weight)  # the average is beside the training
    average = trainer.average.module.conv1[0].weight
    assert torch.equal(average, now) or (average - start).abs().max() < (now - start).abs().max()


# ==== crops ====


def test_local_crops_take_steps_with_dino(config, monkeypatch):
    sizes: list[list[tuple[int, ...]]] = []
    original = Trainer.step

    def step(self: Trainer, at: int, crops: list[Tensor], *rest: Any) -> tuple[Tensor, float]:
        sizes.append([tuple(crop.shape) for crop in crops])
        return original(self, at, crops, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    pairing = PairingConfig("cross", step_targets=2, num_local=2, global_weight=0.4)
    vit = StudentConfig("test_vit", 32, small_images=True)
    objective = replace(config.objective, name="dino")
    train_student(replace(config, student=vit, objective=objective, pairing=pairing, epochs=1))
    assert sizes == [[(8, 2, 3, 32, 32), (8, 2, 3, 12, 12)]] * 3


@pytest.mark.parametrize(
    ("student", "recipe", "given", "side"),
    [
        (StudentConfig("vit_tiny_patch16_224", 224), "dino", None, 96),
        (StudentConfig("vit_tiny_patch16_224", 224), "sslight", None, 128),
        (StudentConfig("vit_tiny_patch16_224", 96), "dino", None, 48),
        (StudentConfig("vit_tiny_patch16_224", 32, True), "dino", None, 12),
        (StudentConfig("resnet18", 32, True), "sslight", None, 20),
        (StudentConfig("resnet18", 8, True), "dino", None, 4),
        (StudentConfig("resnet18", 32, True), "dino", 17, 17),
    ],
)
def test_local_crops_are_in_the_recipes_proportion_in_whole_patches(config, student, recipe, given, side):
    plan = plan_views(PairingConfig("cross", 2, num_local=3), cached_views=2, epoch=0)
    global_set, local_set = crop_sets(replace(config, student=student, local_size=given), get_recipe(recipe), plan)
    assert (global_set.size, local_set.size) == (student.image_size, side)
    assert (len(global_set.ids), len(local_set.ids)) == (2, 3)


# ==== refused before anything is written ====


def refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        train_student(config)
    assert not config.out.exists()


def test_settings_that_cannot_be_leave_no_folder(config, teacher, store):
    with pytest.raises(MisuseError, match=r"`targets` is a path: give Cached\(.*, or Online or Momentum"):
        replace(config, targets=store.path)
    refused(replace(config, loader=replace(LOADER, batch_size=25)), "`batch_size` 25 is more than the 24 images")
    refused(
        replace(config, pairing=PairingConfig("same", step_targets=3)), "holds 2 views .* uses 3: pass `step_targets` 2"
    )
    refused(replace(config, student=StudentConfig("resnet19")), "unknown student 'resnet19': did you mean resnet")
    vit = StudentConfig("test_vit", 30, small_images=True)
    refused(replace(config, student=vit), "cannot take images of 30 x 30 px")
    local = replace(config, student=replace(vit, image_size=32), local_size=14, pairing=PairingConfig(num_local=1))
    refused(local, "cannot take images of 14 x 14 px")
    refused(replace(config, optimiser=replace(NO_WARM_UP, name="adam")), "unknown optimiser 'adam': did you mean adamw")
    refused(replace(config, optimiser=OptimiserConfig(warmup_epochs=4)), "warm-up of 4 epochs leaves nothing")
    refused(replace(config, precision="fp8"), "unknown precision 'fp8': did you mean fp")
    refused(replace(config, precision="fp16"), "fp16 needs a GPU")
    refused(replace(config, device="gpu"), "unknown device 'gpu'")
    live = online(teacher, store, get_recipe("moco-v2"))
    local = replace(config, pairing=PairingConfig(num_local=2), targets=live)
    refused(local, "recipe moco-v2 .* has no local crops")
    with pytest.raises(MisuseError, match="`epochs` is 0"):
        replace(config, epochs=0)


def test_logits_do_not_serve_the_embedding_objective(config, data, teacher, tmp_path):
    logits = tiny_store(tmp_path / "topk.zarr", data, teacher, encoding=Encoding("topk", k=4), loader=LOADER)
    refused(replace(config, targets=Cached(logits.path)), "the store holds logits: cache with `encoding` embedding")
    dino = replace(config, targets=Cached(logits.path), objective=replace(config.objective, name="dino"), epochs=1)
    assert isinstance(train_student(replace(dino, pairing=PairingConfig())), TrainResult)


def test_a_teacher_without_a_head_does_not_serve_dino(config, data, tmp_path):
    plain = tiny_store(tmp_path / "plain.zarr", data, tiny_teacher_checkpoint(tmp_path), loader=LOADER)
    dino = replace(config.objective, name="dino")
    refused(replace(config, targets=Cached(plain.path), objective=dino), "fit prototypes .* --prototypes K")
    fitted = tiny_store(tmp_path / "fitted.zarr", data, tiny_teacher_checkpoint(tmp_path), prototypes=8, loader=LOADER)
    centred = replace(dino, centre_targets="calibration")
    train_student(replace(config, targets=Cached(fitted.path), objective=centred, pairing=PairingConfig(), epochs=1))
    assert Cached(fitted.path).open(RunContext(data, CPU)).space.teacher_temp is not None


def test_defaults_are_those_of_the_command(config, store, tmp_path, monkeypatch):
    """The README's snippet, and the same in words: one configuration, down to the pairing that the objective asks for."""
    from rob import cli
    from rob.student_train import train

    given: list[TrainConfig] = []

    def note_down(config, progress):
        given.append(config)
        raise SystemExit

    monkeypatch.setattr(train, "train_student", note_down)
    for objective in ("embedding", "disco"):
        out = tmp_path / objective
        words = [config.data, "--targets", store.path, "--out", out, "--student", "resnet18", "--objective", objective]
        monkeypatch.setattr(sys, "argv", ["rob", "train-student", *map(str, words)])
        with pytest.raises(SystemExit):
            cli.main()
        said = TrainConfig(config.data, out, StudentConfig("resnet18"), Cached(store.path), ObjectiveConfig(objective))
        pairing = given[-1].pairing
        assert replace(given[-1], pairing=None) == said
        tiny = replace(config, out=out, objective=replace(config.objective, name=objective), epochs=1)
        train_student(replace(tiny, pairing=None))
        assert json.loads((out / "config.json").read_text())["pairing"] == asdict(pairing)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_an_average_that_is_none(config, decay):
    with pytest.raises(MisuseError, match=f"`average` is {decay:g}, expected a value between 0 and 1"):
        replace(config, average=decay)


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
    assert checkpoints == [9, 9]  # after three epochs, and at the end
