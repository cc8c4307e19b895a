"""Optimiser groups, the schedule as a function of the step, and the averaged student."""

import math

import pytest
import torch
from torch import nn

from rob.common.errors import MisuseError
from rob.student_train.optimiser import OptimiserConfig, Schedule, build_average, build_optimiser, clip_gradients
from rob.student_train.students import StudentConfig, build_student


def sgd_at(lr: float, **kwargs) -> tuple[torch.optim.Optimizer, OptimiserConfig]:
    config = OptimiserConfig("sgd", lr=lr, **kwargs)
    return build_optimiser(nn.Linear(3, 2), config, batch_size=256), config


def test_biases_norms_and_position_embeddings_are_not_decayed():
    backbone = build_student(StudentConfig("vit_tiny_patch16_224", 32, small_images=True))
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(backbone.num_features, 8)})
    optimiser = build_optimiser(model, OptimiserConfig("adamw", weight_decay=0.04), batch_size=256)
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name in ("backbone.pos_embed", "backbone.cls_token")
        assert decay.pop(id(parameter)) == (0 if plain else 0.04), name
    assert not decay


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_all_may_decay_as_in_swavs_code(name):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = OptimiserConfig(name, lr=0.1, weight_decay=0.5, decay_all=True)
    optimiser = build_optimiser(layer, config, batch_size=256)
    (group,) = optimiser.param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, 0.5)
    norm, before = layer[1], layer[1].weight.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norm.weight.grad = torch.ones(4)
    optimiser.step()
    wanted = torch.ones(4) + 0.5 * before  # gradient and decay
    # LARS's trust: .001 of the norm of the weights over that of the gradient and the decayed weights
    trust = 0.001 * before.norm() / (torch.ones(4).norm() + 0.5 * before.norm()) if name == "lars" else 1.0
    torch.testing.assert_close(norm.weight.detach(), before - 0.1 * trust * wanted)


def test_a_warm_up_begins_where_it_is_asked_to():
    optimiser, config = sgd_at(0.1, warmup_epochs=2, warmup_lr=0.02, min_lr=0.0)
    schedule = Schedule(optimiser, config, steps_per_epoch=4, epochs=10)
    assert [schedule.step(step) for step in (0, 4, 8)] == pytest.approx([0.02, 0.06, 0.1])
    optimiser, config = sgd_at(0.01, warmup_epochs=2, warmup_lr=0.02, min_lr=0.0)  # of a smaller batch
    schedule = Schedule(optimiser, config, steps_per_epoch=4, epochs=10)
    assert [schedule.step(step) for step in (0, 4, 8)] == pytest.approx([0.01] * 3)


def test_sgd_is_plain_momentum():
    torch.manual_seed(0)
    layer, twin = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    twin.load_state_dict(layer.state_dict())
    ours = build_optimiser(layer, OptimiserConfig("sgd", lr=0.1, weight_decay=0.01), batch_size=512)
    reference = torch.optim.SGD(twin.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    inputs = torch.randn(8, 4)
    for _ in range(5):
        for module, optimiser in ((layer, ours), (twin, reference)):
            optimiser.zero_grad()
            module(inputs).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(layer.weight, twin.weight)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimiser_lowers_a_loss(name):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimiser = build_optimiser(layer, OptimiserConfig(name, lr=0.05, weight_decay=1e-6), batch_size=256)
    inputs = torch.randn(32, 4)
    losses = []
    for _ in range(20):
        loss = layer(inputs).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("lr", "trust", "share"), [(2.0, None, 0.002), (0.1, 0.02, 0.002), (0.1, 0.001, 0.0001)])
def test_lars_moves_weights_by_a_share_of_their_norm_and_biases_by_the_rate(lr, trust, share):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimiser = build_optimiser(layer, OptimiserConfig("lars", lr=lr, weight_decay=1e-6, trust=trust), batch_size=256)
    layer(torch.randn(32, 64)).square().mean().backward()
    optimiser.step()
    moved = (layer.weight.detach() - before).norm() / before.norm()
    assert moved.item() == pytest.approx(share, rel=0.01)
    torch.testing.assert_close(layer.bias.detach(), bias - lr * layer.bias.grad)


def test_learning_rate_warms_up_then_follows_a_cosine():
    optimiser, config = sgd_at(1.0, min_lr=0.1, warmup_epochs=2)
    schedule = Schedule(optimiser, config, steps_per_epoch=10, epochs=10)
    rates = [schedule.step(step) for step in range(101)]
    assert rates[:21] == pytest.approx([step / 20 for step in range(21)])
    assert rates[60] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 40 / 80)) / 2)
    assert rates[100] == pytest.approx(0.1)
    assert optimiser.param_groups[0]["lr"] == rates[-1]


def test_a_run_of_one_step_has_its_rate_and_timm_warns_of_nothing(caplog):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    assert Schedule(optimiser, OptimiserConfig("sgd", lr=0.3, warmup_epochs=0.0), 1, 1).step(0) == 0.3
    assert caplog.text == ""


def test_schedule_depends_on_the_step_alone():
    """A resumed run builds everything anew, loads the optimiser's state and asks for a later step."""
    optimiser, config = sgd_at(1.0, warmup_epochs=1, weight_decay=0.04, weight_decay_end=0.4)
    schedule = Schedule(optimiser, config, 10, 4)
    for step in range(25):
        schedule.step(step)
    resumed, _ = sgd_at(1.0, warmup_epochs=1, weight_decay=0.04, weight_decay_end=0.4)
    later = Schedule(resumed, config, 10, 4)
    resumed.load_state_dict(optimiser.state_dict())
    assert later.step(25) == schedule.step(25)
    assert [g["weight_decay"] for g in resumed.param_groups] == [g["weight_decay"] for g in optimiser.param_groups]


def test_weight_decay_follows_its_own_cosine_and_spares_biases():
    optimiser, config = sgd_at(1.0, warmup_epochs=0, weight_decay=0.04, weight_decay_end=0.4)
    schedule = Schedule(optimiser, config, 10, 2)
    for step, expected in ((0, 0.04), (10, 0.22), (20, 0.4)):
        schedule.step(step)
        assert sorted(group["weight_decay"] for group in optimiser.param_groups) == pytest.approx([0, expected])


def test_misuse_is_one_sentence():
    with pytest.raises(MisuseError, match=r"unknown optimiser 'adam'.*adamw"):
        build_optimiser(nn.Linear(2, 2), OptimiserConfig("adam"), 256)
    with pytest.raises(MisuseError, match="weight decay"):
        build_optimiser(nn.Linear(2, 2), OptimiserConfig("lars", weight_decay=0), 256)
    with pytest.raises(MisuseError, match=r"`trust` is for `optimiser` lars, and it is adamw"):
        build_optimiser(nn.Linear(2, 2), OptimiserConfig(trust=0.02), 256)
    with pytest.raises(MisuseError, match=r"`trust` is 0, expected a value above 0"):
        build_optimiser(nn.Linear(2, 2), OptimiserConfig("lars", trust=0), 256)
    optimiser, config = sgd_at(1.0, warmup_epochs=10)
    with pytest.raises(MisuseError, match="`warmup_epochs` 10 leave nothing"):
        Schedule(optimiser, config, 5, 10)


def test_average_forgets_its_random_start_and_then_lags():
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    average = build_average(layer, decay=0.99)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    average.update(layer, 0)
    assert torch.equal(average.module.weight, layer.weight)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    average.update(layer, 10_000)
    torch.testing.assert_close(average.module.weight, torch.full((2, 2), 1.01))


def test_weight_decay_may_rise_from_0():
    model = nn.Linear(3, 2)
    config = OptimiserConfig(weight_decay=0.0, weight_decay_end=0.4, warmup_epochs=0)
    optimiser = build_optimiser(model, config, batch_size=256)
    schedule = Schedule(optimiser, config, steps_per_epoch=10, epochs=1)
    for step, expected in ((0, 0.0), (5, 0.2), (9, 0.4 * 0.5 * (1 - math.cos(math.pi * 0.9)))):
        schedule.step(step)
        decay = {p.ndim: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
        assert decay == {1: 0.0, 2: pytest.approx(expected)}


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("limit", [0.3, 3.0, math.inf])
def test_clipping_is_by_one_norm_or_by_each_tensors(limit, each):
    """main_dino.py clips a tensor at a time: what is longer than the limit is scaled by limit / (norm + 1e-6)."""
    torch.manual_seed(0)
    shapes = [(4, 3), (5,), (2, 2, 2), (1,)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    gradients = [
        size * torch.randn(shape, dtype=torch.float64) for size, shape in zip((2, 0.1, 1, 0), shapes, strict=True)
    ]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    without = nn.Parameter(torch.zeros(3))
    whole = math.sqrt(sum(value**2 for gradient in gradients for value in gradient.flatten().tolist()))
    norm = clip_gradients([*parameters, without], limit, each)
    assert norm.item() == pytest.approx(whole, rel=1e-12)
    assert without.grad is None
    for parameter, gradient in zip(parameters, gradients, strict=True):
        own = math.sqrt(sum(value**2 for value in gradient.flatten().tolist()))
        scale = min(1.0, limit / ((own if each else whole) + 1e-6))
        for found, value in zip(parameter.grad.flatten().tolist(), gradient.flatten().tolist(), strict=True):
            assert found == pytest.approx(value * scale, rel=1e-12, abs=1e-15)
