"""Linear classification of frozen features, many learning rates and weight decays trained in one pass as in DINOv2.

The heads of all settings see the same batches, so they stand side by side in one matrix: a step is two matrix products
for all of them. A validation part of the training set chooses the setting, which may be trained anew on all of it; the test
set is looked at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...common.errors import MisuseError
from ..optimiser import cosine_decay
from .config import LinearConfig
from .features import Features, same_classes
from .subsets import hold_out


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


def linear(
    train: Features,
    test: Features,
    config: LinearConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LinearResult:
    """Sweep, choose, test. Runs on the device the features are on; ``progress`` is called with (steps done, all).

    MisuseError: a test class that the training set lacks, or a class with fewer than two training images.
    """
    config = config or LinearConfig()
    test = same_classes(train, test)
    fit_rows, held_out = split_validation(train, config)
    fit, validation = train.rows(fit_rows), train.rows(held_out)
    heads = train_heads(fit, config, progress)
    return choose_and_test(heads, validation, test, config, len(fit), partial(train_heads, train, progress=progress))


def split_validation(train: Features, config: LinearConfig) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to choose by, ascending: ``config.validation`` of each class are held out.

    MisuseError: a class that would have nothing left to train on.
    """
    return hold_out(train, config.validation, config.seed, "linear wants at least 2, one to choose by")


def choose_and_test(
    heads: LinearHeads,
    validation: Features,
    test: Features,
    config: LinearConfig,
    num_train: int,
    refit: Callable[[LinearConfig], LinearHeads],
) -> LinearResult:
    """The setting that is best on ``validation``, the first of equals, and its accuracies on ``test``.

    ``config.refit``: ``refit`` trains the chosen setting alone on the validation part as well, and that head is tested.
    """
    accuracies = top_k_accuracy(heads, validation, 1).tolist()
    settings = product(config.learning_rates, config.weight_decays)
    sweep = tuple(LinearSetting(*setting, top1) for setting, top1 in zip(settings, accuracies, strict=True))
    best = accuracies.index(max(accuracies))
    chosen, head = sweep[best], heads.head(best)
    if config.refit:
        alone = {"learning_rates": (chosen.learning_rate,), "weight_decays": (chosen.weight_decay,)}
        head, num_train = refit(replace(config, **alone)), num_train + len(validation)
    top1, top5 = (top_k_accuracy(head, test, k).item() for k in (1, 5))
    return LinearResult(top1, top5, chosen, sweep, num_train, len(validation), len(test), config.epochs)


def train_heads(
    train: Features, config: LinearConfig, progress: Callable[[int, int], None] | None = None
) -> LinearHeads:
    """A head for every setting, in the order of ``product(learning_rates, weight_decays)``, all from zero.

    A head that diverges (too great a rate) ends in NaN and leaves the others alone.
    """
    sweep = HeadSweep(train, config)
    standardised = sweep.standardise(train.features)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        order = torch.randperm(len(train), generator=generator).to(train.labels.device)
        for rows in order.split(config.batch_size):
            sweep.step(standardised[rows], train.labels[rows])
            if progress:
                progress(sweep.steps_done, sweep.num_steps)
    return sweep.heads()


class HeadSweep:
    """The heads of all settings in training. ``train`` gives the statistics that standardise features, the classes and
    the number of images an epoch.

    MisuseError: nothing to sweep, or no epoch.
    """

    def __init__(self, train: Features, config: LinearConfig) -> None:
        if not config.learning_rates or not config.weight_decays:
            raise MisuseError("a linear evaluation needs at least one learning rate and one weight decay")
        self.norm = BatchNorm(train.features.shape[1], train.features.device) if config.batch_norm else None
        self.mean = train.features.mean(0)
        self.scale = 1 / train.features.std(0).clamp_min(1e-6)
        rates, decays = torch.tensor(
            [*product(config.learning_rates, config.weight_decays)],
            dtype=torch.float32,
            device=train.labels.device,
        ).T

        # Class-major columns (C, H): the softmax over classes then runs along contiguous heads, 10 times as fast on a CPU.
        self.shape = (train.num_classes, len(rates))
        self.rates, self.decays = rates.repeat(train.num_classes), decays.repeat(train.num_classes)
        self.momentum = config.momentum
        self.weights = self.mean.new_zeros(len(self.mean), train.num_classes * len(rates))
        self.biases = self.mean.new_zeros(train.num_classes * len(rates))
        self.weight_momentum, self.bias_momentum = torch.zeros_like(self.weights), torch.zeros_like(self.biases)
        self.num_steps = config.epochs * -(-len(train) // config.batch_size)
        self.steps_done = 0

    def standardise(self, features: Tensor) -> Tensor:
        """Features as ``step`` takes them: the norm, where there is one, wants them as they are."""
        return features if self.norm else (features - self.mean) * self.scale

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One step of SGD for every head: ``x`` (B, D) standardised features, ``labels`` (B,)."""
        x = self.norm(x) if self.norm else x
        # The gradient of the mean cross-entropy by the logits: (softmax - one-hot) / B.
        logits = torch.addmm(self.biases, x, self.weights).view(len(x), *self.shape)
        gradient = logits.softmax(1)
        gradient[torch.arange(len(x), device=x.device), labels] -= 1
        gradient = gradient.view(len(x), -1).div_(len(x))

        self.weight_momentum.mul_(self.momentum).addcmul_(self.weights, self.decays).addmm_(x.T, gradient)
        self.bias_momentum.mul_(self.momentum).add_(gradient.sum(0))
        step_sizes = self.rates * -cosine_decay(self.steps_done, self.num_steps)
        self.weights.addcmul_(self.weight_momentum, step_sizes)
        self.biases.addcmul_(self.bias_momentum, step_sizes)
        self.steps_done += 1

    def heads(self) -> LinearHeads:
        mean, scale = (self.norm.mean, self.norm.scale) if self.norm else (self.mean, self.scale)
        return LinearHeads(self.weights.unflatten(1, self.shape), self.biases.unflatten(0, self.shape), mean, scale)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed sweep goes on from; the rest follows from the features and the configuration."""
        return {
            "weights": self.weights,
            "biases": self.biases,
            "weight_momentum": self.weight_momentum,
            "bias_momentum": self.bias_momentum,
            "steps_done": self.steps_done,
            **({"mean": self.norm.mean, "variance": self.norm.variance} if self.norm else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.biases = state["weights"], state["biases"]
        self.weight_momentum, self.bias_momentum = state["weight_momentum"], state["bias_momentum"]
        self.steps_done = state["steps_done"]
        if self.norm:
            self.norm.mean, self.norm.variance = state["mean"], state["variance"]


class BatchNorm:
    """``torch.nn.BatchNorm1d(D, affine=False)`` in training, on all heads' common input.

    The released evaluation's has a gain and a bias, which say nothing that the linear layer behind it cannot say.
    """

    eps, momentum = 1e-5, 0.1

    def __init__(self, dim: int, device: torch.device) -> None:
        self.mean, self.variance = torch.zeros(dim, device=device), torch.ones(dim, device=device)

    @property
    def scale(self) -> Tensor:
        return (self.variance + self.eps).rsqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, D) by the batch's own mean and deviation, which go into the running ones; by these where B is 1."""
        if len(x) == 1:
            return (x - self.mean) * self.scale
        variance, mean = torch.var_mean(x, 0, correction=0)
        self.mean = self.mean.lerp(mean, self.momentum)
        self.variance = self.variance.lerp(variance * len(x) / (len(x) - 1), self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt()


def top_k_accuracy(heads: LinearHeads, test: Features, k: int) -> Tensor:
    """Percent of ``test`` whose label is among the k greatest logits, for every head (H,)."""
    hits = test.features.new_zeros(heads.biases.shape[1])
    for features, labels in zip(test.features.split(4096), test.labels.split(4096), strict=True):
        best = heads.logits(features).topk(min(k, len(heads.biases)), dim=1).indices
        hits += (best == labels[:, None, None]).any(1).sum(0)
    return 100 * hits / len(test)
