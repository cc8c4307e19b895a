"""Linear classification of frozen features, many learning rates and weight decays trained in one pass as in DINOv2.

The heads of all settings see the same batches, so they stand side by side in one matrix: a step is two matrix products
for all of them. A validation part of the training set chooses the setting; the test set is looked at once.
"""

from dataclasses import asdict, dataclass
from itertools import product
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from ...common.errors import MisuseError
from .features import Features, same_classes
from .subsets import balanced_subset


@dataclass(frozen=True)
class LinearConfig:
    """SGD with momentum and a cosine to 0, for every pair of ``learning_rates`` and ``weight_decays`` (>= 0).

    Rates are for standardised features. ``validation`` in (0, 1) is the share of each class kept for choosing.
    """

    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    weight_decays: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1)
    epochs: int = 100
    batch_size: int = 256
    momentum: float = 0.9
    validation: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class LinearSetting:
    """One setting of a sweep, and its accuracy on the validation part in percent."""

    learning_rate: float
    weight_decay: float
    validation_top1: float


@dataclass(frozen=True)
class LinearResult:
    """Test accuracies in percent of the ``chosen`` setting; ``num_train`` counts the images it was trained on."""

    top1: float
    top5: float
    chosen: LinearSetting
    sweep: tuple[LinearSetting, ...]
    num_train: int
    num_validation: int
    num_test: int
    epochs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LinearHeads:
    """H linear classifiers of standardised features: ``weights`` (D, C, H) and ``biases`` (C, H)."""

    weights: Tensor
    biases: Tensor
    mean: Tensor
    scale: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, C, H) for features (N, D)."""
        rows = (features - self.mean) * self.scale
        return torch.addmm(self.biases.flatten(), rows, self.weights.flatten(1)).unflatten(1, self.biases.shape)

    def head(self, index: int) -> "LinearHeads":
        chosen = slice(index, index + 1)
        return LinearHeads(self.weights[..., chosen], self.biases[..., chosen], self.mean, self.scale)


def linear(train: Features, test: Features, config: LinearConfig = LinearConfig()) -> LinearResult:
    """Sweep, choose, test. Runs on the device the features are on.

    MisuseError: a test class that the training set lacks, or a class with fewer than two training images.
    """
    test = same_classes(train, test)
    held_out = balanced_subset(train.labels, fraction=config.validation, seed=config.seed)
    kept = torch.ones(len(train), dtype=torch.bool, device=train.labels.device)
    kept[held_out] = False
    fit, validation = train.rows(kept.nonzero().flatten()), train.rows(held_out)
    lone = validation.labels[~torch.isin(validation.labels, fit.labels)]
    if len(lone):
        raise MisuseError(f"class {int(lone[0])} has one training image, linear wants at least 2: one to choose by")

    heads = train_heads(fit, config)
    accuracies = top_k_accuracy(heads, validation, 1).tolist()
    settings = product(config.learning_rates, config.weight_decays)
    sweep = tuple(LinearSetting(*setting, top1) for setting, top1 in zip(settings, accuracies, strict=True))
    best = accuracies.index(max(accuracies))
    top1, top5 = (top_k_accuracy(heads.head(best), test, k).item() for k in (1, 5))
    return LinearResult(top1, top5, sweep[best], sweep, len(fit), len(validation), len(test), config.epochs)


def train_heads(train: Features, config: LinearConfig) -> LinearHeads:
    """A head for every setting, in the order of ``product(learning_rates, weight_decays)``, all from zero.

    A head that diverges (too great a rate) ends in NaN and leaves the others alone.
    """
    if config.epochs < 1 or not config.learning_rates or not config.weight_decays:
        raise MisuseError("a linear evaluation needs at least one epoch, one learning rate and one weight decay")
    mean = train.features.mean(0)
    scale = 1 / train.features.std(0).clamp_min(1e-6)
    features_ND, labels = (train.features - mean) * scale, train.labels
    rates, decays = torch.tensor(
        [*product(config.learning_rates, config.weight_decays)], dtype=torch.float32, device=labels.device
    ).T

    # Class-major columns (C, H): the softmax over classes then runs along contiguous heads, 10 times as fast on a CPU.
    num_heads, num_classes, dim = len(rates), train.num_classes, features_ND.shape[1]
    rates, decays = rates.repeat(num_classes), decays.repeat(num_classes)
    weights = features_ND.new_zeros(dim, num_classes * num_heads)
    biases = features_ND.new_zeros(num_classes * num_heads)
    weight_momentum, bias_momentum = torch.zeros_like(weights), torch.zeros_like(biases)

    generator = torch.Generator().manual_seed(config.seed)
    num_steps = config.epochs * -(-len(labels) // config.batch_size)
    step = 0
    for _ in range(config.epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in order.split(config.batch_size):
            x = features_ND[rows]
            # The gradient of the mean cross-entropy by the logits: (softmax - one-hot) / B.
            logits = torch.addmm(biases, x, weights).view(len(rows), num_classes, num_heads)
            gradient = logits.softmax(1)
            gradient[torch.arange(len(rows), device=rows.device), labels[rows]] -= 1
            gradient = gradient.view(len(rows), -1).div_(len(rows))

            weight_momentum.mul_(config.momentum).addcmul_(weights, decays).addmm_(x.T, gradient)
            bias_momentum.mul_(config.momentum).add_(gradient.sum(0))
            step_sizes = rates * -(0.5 * (1 + cos(pi * step / num_steps)))
            weights.addcmul_(weight_momentum, step_sizes)
            biases.addcmul_(bias_momentum, step_sizes)
            step += 1
    shape = (num_classes, num_heads)
    return LinearHeads(weights.unflatten(1, shape), biases.unflatten(0, shape), mean, scale)


def top_k_accuracy(heads: LinearHeads, test: Features, k: int) -> Tensor:
    """Percent of ``test`` whose label is among the k greatest logits, for every head (H,)."""
    hits = test.features.new_zeros(heads.biases.shape[1])
    for features, labels in zip(test.features.split(4096), test.labels.split(4096), strict=True):
        best = heads.logits(features).topk(min(k, len(heads.biases)), dim=1).indices
        hits += (best == labels[:, None, None]).any(1).sum(0)
    return 100 * hits / len(test)
