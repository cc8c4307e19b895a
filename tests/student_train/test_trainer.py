"""Every way to take a step."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from rob.common.errors import MisuseError
from rob.common.ranks import Ranks
from rob.student_train import trainer as trainer_module
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.momentum import Momentum, MomentumTargets
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.targets.space import PatchSpace, TargetSpace
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from support.training import CPU, STEPS_PER_EPOCH


@pytest.mark.parametrize(
    "changes",
    [
        {"average": 0.5, "clip_grad": 0.0, "precision": "bf16"},
        {"clip_each": True, "optimiser": OptimiserConfig("sgd", warmup_epochs=0)},
        {"accumulate": 4, "optimiser": OptimiserConfig("lars", weight_decay=1e-6, warmup_epochs=0)},
        {"optimiser": OptimiserConfig(warmup_epochs=0.5, weight_decay_end=0.4)},
        {"pairing": PairingConfig("all", step_targets=2), "targets": {"cache_in_memory": True}},
        {"student": StudentConfig("test_vit", 32, small_images=True)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:40],
)
def test_variants_take_steps(config, changes):
    if "targets" in changes:
        changes = changes | {"targets": replace(config.targets, **changes["targets"])}
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


def steps_on_noise(trainer: Trainer, count: int) -> Iterator[Tensor]:
    """(loss, gradient norm) of the first ``count`` steps, after each of them."""
    random = torch.Generator().manual_seed(0)
    for number in range(count):
        crops = [torch.randn(4, 1, 3, 32, 32, generator=random)]
        target = EmbeddingTarget(F.normalize(torch.randn(4, 1, 24, generator=random), dim=-1))
        yield trainer.step(number, crops, target, torch.ones(1, 1))[0]


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


@pytest.mark.parametrize(("limit", "decay"), [(0.9, 1 - 2 ** (-2 / 3)), (0.2, 0.2)])
def test_the_average_follows_the_student_at_its_decay(config, limit, decay):
    """Which grows up to ``limit``, and is 0 in the first two steps."""
    config = replace(config, optimiser=OptimiserConfig(lr=0.1, warmup_epochs=0))
    trainer, without = build(replace(config, average=limit)), build(config)
    seen = [trainer.model.backbone.conv1[0].weight.detach().clone() for _ in steps_on_noise(trainer, 3)]
    assert (seen[2] - seen[1]).abs().max() > 1e-3
    average = trainer.average.module.conv1[0].weight
    torch.testing.assert_close(average, decay * seen[1] + (1 - decay) * seen[2], rtol=0, atol=1e-6)
    assert len([*steps_on_noise(without, 3)]) == 3
    assert torch.equal(seen[2], without.model.backbone.conv1[0].weight)  # the average is beside the training


@pytest.mark.parametrize(
    "changes", [{"clip_grad": 0.0}, {"clip_grad": 0.01}, {"clip_grad": 1e-3, "clip_each": True, "accumulate": 2}]
)
def test_a_scaled_loss_is_the_same_training(config, changes):
    """Gradients are those of the loss itself again before they are clipped and logged."""
    config, found = replace(config, **changes, optimiser=OptimiserConfig(lr=0.1, warmup_epochs=0)), []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        trainer = build(config)
        trainer.scaler = scaler or trainer.scaler
        health = torch.stack([*steps_on_noise(trainer, 2)])
        found.append((health, trainer.model.backbone.conv1[0].weight.detach()))
    (exact, weight), (scaled, scaled_weight) = found
    torch.testing.assert_close(scaled, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled_weight, weight, rtol=0, atol=1e-6)


class Scaler:
    """Like GradScaler on a GPU: skips the steps in ``overflowing``."""

    def __init__(self, *overflowing: int) -> None:
        self.overflowing, self.steps = overflowing, 0

    def is_enabled(self) -> bool:
        return True

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale_(self, optimiser: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimiser: torch.optim.Optimizer) -> None:
        if self.steps not in self.overflowing:
            optimiser.step()

    def update(self) -> None:
        self.steps += 1


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars"])
def test_a_step_that_fp16_skips_moves_neither_student_nor_average(config, optimiser):
    config = replace(config, average=0.5, optimiser=OptimiserConfig(optimiser, weight_decay=1e-6, warmup_epochs=0))
    trainer = build(config)
    trainer.scaler = Scaler(3)
    random = torch.Generator().manual_seed(0)
    target = EmbeddingTarget(F.normalize(torch.randn(4, 1, 24, generator=random), dim=-1))
    moved = []
    for step in range(5):  # the first two averages are the student itself, which no update would move
        before = [[p.clone() for p in model.parameters()] for model in (trainer.model, trainer.average.module)]
        trainer.step(step, [torch.randn(4, 1, 3, 32, 32, generator=random)], target, torch.ones(1, 1))
        after = [[*model.parameters()] for model in (trainer.model, trainer.average.module)]
        same = [all(map(torch.equal, old, new)) for old, new in zip(before, after, strict=True)]
        moved.append(trainer.moved)
        assert same == [not trainer.moved] * 2
    assert moved == [True, True, True, False, True]


def test_a_step_that_fp16_skips_does_not_move_the_copy(config, monkeypatch):
    moved: list[int] = []
    original = Trainer.__init__

    def with_scaler(self: Trainer, *arguments: object) -> None:
        original(self, *arguments)
        self.scaler = Scaler(2, 3)
        self.scaler.state_dict = dict
        self.scaler.load_state_dict = lambda state: None

    monkeypatch.setattr(Trainer, "__init__", with_scaler)
    monkeypatch.setattr(MomentumTargets, "after_step", lambda self, step: moved.append(step))
    objective = replace(config.objective, name="moco", queue=20)
    pairing = PairingConfig("cross", step_targets=2, fresh=False)
    train_student(replace(config, targets=Momentum(), objective=objective, pairing=pairing, epochs=2))
    assert moved == [0, 1, 4, 5]


def test_a_rehearsal_leaves_no_trace(config):
    """Of the step that it goes through once to compile it: not even of what is drawn, nor of the queue."""
    config = replace(config, objective=ObjectiveConfig("moco", hidden_dim=16, queue=8))
    random = torch.Generator().manual_seed(0)
    crops = [torch.randn(4, 1, 3, 32, 32, generator=random)]
    target, weights = EmbeddingTarget(F.normalize(torch.randn(4, 1, 24, generator=random), dim=-1)), torch.ones(1, 1)
    found = []
    for rehearsed in (False, True):
        trainer = build(replace(config, student=replace(config.student, drop_path=0.5)))
        if rehearsed:
            trainer.rehearse(crops, target, weights)
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        health, _ = trainer.step(0, crops, target, weights)
        found.append([health, *(v for v in trainer.model.state_dict().values() if isinstance(v, Tensor))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("name", "asked", "joined"), [("dino", None, True), ("moco", None, False), ("dino", False, False)]
)
def test_batchnorm_is_joined_as_the_objective_s_paper_has_it(config, monkeypatch, name, asked, joined):
    done = []
    monkeypatch.setattr(trainer_module, "join_batchnorms", done.append)
    trainer = build(replace(config, objective=ObjectiveConfig(name, hidden_dim=16), sync_batchnorm=asked))
    assert done == [trainer.model] * joined


@pytest.mark.parametrize(
    ("changes", "device", "ranks", "reason"),
    [
        ({}, "cpu", 1, "`device` cpu has none"),
        ({}, "cuda", 2, "there are 2 ranks"),
        ({"accumulate": 2}, "cuda", 1, "`accumulate` runs the student several times"),
        ({"knn_every": 1}, "cuda", 1, "`knn_every` runs the student between steps"),
        ({}, "cuda", 1, None),
    ],
)
def test_graphs_are_replayed_only_where_that_is_safe(config, changes, device, ranks, reason):
    config = replace(config, compile="reduce-overhead", **changes)
    check = lambda: trainer_module.check_replay(config, torch.device(device), Ranks(0, ranks))  # noqa: E731
    if reason is None:
        return check()
    with pytest.raises(MisuseError, match=reason):
        check()


def test_a_student_whose_patches_are_read_is_not_compiled(config, monkeypatch):
    """Its maps are read past the call that would be: asked for it is refused, as a stored default left out."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: pytest.fail("it is compiled"))
    monkeypatch.setattr(trainer_module, "stored_settings", lambda device: SimpleNamespace(compile_mode="default"))
    space = TargetSpace(24, 10, True, 0.05, patches=PatchSpace("grid", 4, 24))
    config = replace(config, objective=ObjectiveConfig("patch", hidden_dim=16), pairing=PairingConfig("same", 1))
    assert not build(config, space).compiles
    with pytest.raises(MisuseError, match=r"`compile` default does nothing for `objective` patch, .* `patch_weight` 0"):
        build(replace(config, compile="default"), space)


def test_an_objective_knows_of_global_crops_beyond_the_targets(config):
    config = replace(config, objective=ObjectiveConfig("dino", hidden_dim=16))
    assert build(replace(config, pairing=PairingConfig("cross", 1, step_globals=3))).objective.num_global == 3


def test_a_replayed_student_says_when_a_step_begins_and_its_copy_is_not_replayed(config, monkeypatch):
    """What torch is asked for; there is no GPU to do it."""
    said = []
    monkeypatch.setattr(trainer_module, "check_replay", lambda *_: said.append("checked"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: said.append(how["mode"]))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: said.append("step"))
    trainer, _ = some_step(replace(config, compile="reduce-overhead"))
    trainer.model.copy_for_targets()
    assert said == ["checked", "reduce-overhead", "step", None]
    said.clear()
    some_step(replace(config, compile="default"))
    some_step(replace(config, compile=None))
    assert said == [None]
