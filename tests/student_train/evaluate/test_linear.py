"""The linear sweep: every head as if alone, the choice on held-out images, the optimum where there is one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rob.common.errors import MisuseError
from rob.student_train.evaluate.features import Features
from rob.student_train.evaluate.linear import (
    BatchNorm,
    LinearConfig,
    linear,
    split_validation,
    top_k_accuracy,
    train_heads,
)
from rob.student_train.evaluate.logistic import fit_logistic
from support.gaussians import gaussian_classes

QUICK = LinearConfig(learning_rates=(0.01, 0.1), weight_decays=(0.0, 1e-2), epochs=3, batch_size=64)


def test_a_head_of_the_sweep_is_the_head_trained_alone():
    train = gaussian_classes(300, seed=1)
    heads = train_heads(train, QUICK)
    for index, (rate, decay) in enumerate([(0.01, 0.0), (0.01, 1e-2), (0.1, 0.0), (0.1, 1e-2)]):
        alone = train_heads(train, replace(QUICK, learning_rates=(rate,), weight_decays=(decay,)))
        torch.testing.assert_close(heads.head(index).weights, alone.weights)
        torch.testing.assert_close(heads.head(index).biases, alone.biases)


def test_steps_are_those_of_torch_sgd():
    """The hand-written gradient, momentum, decay and cosine against autograd, torch.optim and its scheduler."""
    train = gaussian_classes(160, seed=1)
    config = replace(QUICK, learning_rates=(0.1,), weight_decays=(1e-2,))
    heads = train_heads(train, config)
    layer = nn.Linear(32, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 1e-2}, {"params": [layer.bias]}]
    optimiser = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=9)
    rows = (train.features - train.features.mean(0)) / train.features.std(0)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for batch in torch.randperm(160, generator=generator).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(rows[batch]), train.labels[batch]).backward()
            optimiser.step()
            schedule.step()
    torch.testing.assert_close(heads.weights[..., 0].T, layer.weight.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.biases[:, 0], layer.bias.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [160, 129])
def test_batch_norm_is_torchs_without_gain_and_bias(count):
    """Steps, running statistics and tested logits; a last batch of one image goes by the running ones."""
    train, test = gaussian_classes(count, seed=1), gaussian_classes(50, seed=2)
    train.features[:, 0] += 5
    config = replace(QUICK, learning_rates=(0.1,), weight_decays=(1e-2,), batch_norm=True)
    heads = train_heads(train, config)
    norm, layer = nn.BatchNorm1d(32, affine=False), nn.Linear(32, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 1e-2}, {"params": [layer.bias]}]
    optimiser = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=9)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for batch in torch.randperm(count, generator=generator).split(64):
            optimiser.zero_grad()
            norm.train(len(batch) > 1)
            nn.functional.cross_entropy(layer(norm(train.features[batch])), train.labels[batch]).backward()
            optimiser.step()
            schedule.step()
    expected = layer(norm.eval()(test.features))
    torch.testing.assert_close(heads.logits(test.features)[..., 0], expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_is_a_plain_double_loop():
    norm, batches = BatchNorm(2, torch.device("cpu")), torch.randn(3, 5, 2, dtype=torch.float64)
    norm.mean, norm.variance = norm.mean.double(), norm.variance.double()
    for d in range(2):
        mean, variance = 0.0, 1.0
        own = BatchNorm(1, torch.device("cpu"))
        own.mean, own.variance = own.mean.double(), own.variance.double()
        for batch in batches:
            found = own(batch[:, d : d + 1]).flatten()
            values = batch[:, d].tolist()
            m = sum(values) / 5
            v = sum((value - m) ** 2 for value in values) / 5
            for n in range(5):
                assert abs(found[n].item() - (values[n] - m) / (v + 1e-5) ** 0.5) < 1e-10
            mean, variance = 0.9 * mean + 0.1 * m, 0.9 * variance + 0.1 * v * 5 / 4
        assert abs(own.mean.item() - mean) < 1e-10
        assert abs(own.variance.item() - variance) < 1e-10
        assert abs(own.scale.item() - (variance + 1e-5) ** -0.5) < 1e-10


def test_a_refit_is_the_chosen_setting_trained_on_all():
    train, test = gaussian_classes(300, seed=1), gaussian_classes(1000, seed=2)
    before, after = linear(train, test, replace(QUICK, refit=False)), linear(train, test, QUICK)
    assert (after.sweep, after.chosen) == (before.sweep, before.chosen)
    assert (before.num_train, after.num_train, after.num_validation) == (270, 300, 30)
    chosen = (before.chosen.learning_rate,), (before.chosen.weight_decay,)
    alone = replace(QUICK, learning_rates=chosen[0], weight_decays=chosen[1])
    fit, _ = split_validation(train, QUICK)
    assert before.top1 == top_k_accuracy(train_heads(train.rows(fit), alone), test, 1).item()
    assert after.top1 == top_k_accuracy(train_heads(train, alone), test, 1).item() != before.top1


def test_a_long_run_reaches_the_regularised_optimum():
    train, test = gaussian_classes(500, seed=1), gaussian_classes(1000, seed=2)
    config = LinearConfig(learning_rates=(1.0,), weight_decays=(1e-2,), epochs=300, batch_size=500)
    heads = train_heads(train, config)
    standardised = Features((train.features - heads.mean) * heads.scale, train.labels)
    optimum = fit_logistic(standardised, 1e-2)
    torch.testing.assert_close(heads.weights[..., 0].double(), optimum.weights, rtol=0, atol=5e-3)
    agreement = heads.logits(test.features)[..., 0].argmax(1) == optimum.logits(
        (test.features - heads.mean) * heads.scale
    ).argmax(1)
    assert agreement.double().mean() > 0.99


def test_the_sweep_chooses_by_validation_and_tests_that_head():
    train, test = gaussian_classes(600, seed=1), gaussian_classes(1000, seed=2)
    result = linear(train, test, replace(QUICK, learning_rates=(100.0, 0.03), weight_decays=(0.0, 100.0)))
    assert (result.chosen.learning_rate, result.chosen.weight_decay) == (0.03, 0.0)
    assert result.chosen.validation_top1 == max(setting.validation_top1 for setting in result.sweep)
    assert (result.num_train, result.num_validation, result.num_test) == (600, 60, 1000)
    assert 40 < result.top1 < result.top5 < 100
    assert result.to_json()["chosen"]["learning_rate"] == 0.03
    assert linear(train, test, replace(QUICK, learning_rates=(0.03,), weight_decays=(0.0,))).top1 == result.top1


def test_the_test_set_plays_no_part_in_the_choice():
    train = gaussian_classes(300, seed=1)
    swapped = gaussian_classes(300, seed=2)
    wrong = Features(swapped.features, (swapped.labels + 1) % 10)
    assert linear(train, swapped, QUICK).sweep == linear(train, wrong, QUICK).sweep


def test_a_diverging_head_leaves_the_others_alone():
    train = gaussian_classes(300, seed=1)
    heads = train_heads(train, replace(QUICK, learning_rates=(100.0, 0.03), weight_decays=(1.0,), epochs=10))
    assert not heads.head(0).weights.isfinite().all()
    assert heads.head(1).weights.isfinite().all()
    assert top_k_accuracy(heads, gaussian_classes(500, seed=2), 1)[1] > 40


def test_a_dead_feature_does_no_harm():
    train = gaussian_classes(300, seed=1)
    train.features[:, 3] = 7.0
    assert train_heads(train, QUICK).weights.isfinite().all()


def test_bad_input_is_refused():
    train = gaussian_classes(100)
    with pytest.raises(MisuseError, match="class 10 of the test set has no image in the training set"):
        linear(train, Features(train.features[:1], torch.tensor([10])))
    lone = Features(torch.cat([train.features, train.features[:1]]), torch.cat([train.labels, torch.tensor([10])]))
    with pytest.raises(MisuseError, match="class 10 has one image, none is left to train on: linear wants at least 2"):
        linear(lone, train)
    with pytest.raises(MisuseError, match="`epochs` is 0, expected at least 1"):
        linear(train, train, replace(QUICK, epochs=0))
