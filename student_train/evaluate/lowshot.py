"""Classification from few labels: logistic regression on the frozen features of small, fixed subsets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch.nn.functional as F

from ...common.errors import MisuseError
from .features import Features, same_classes
from .logistic import fit_logistic
from .subsets import balanced_subset

REGULARISATION = 1e-3
"""Fixed, since so few labels leave none to choose by. On CIFAR-10 with 1, 5 and 50 images a class, for an ImageNet
network's features as for raw pixels, it is about 1 point of the best of 1e-6 ... 1, which the test set would show."""


@dataclass(frozen=True)
class LowshotResult:
    """Accuracies in percent, one a seed, their mean and sample standard deviation (None for one seed)."""

    fraction: float | None
    per_class: int | None
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    mean: float
    deviation: float | None
    regularisation: float
    num_train: int
    num_test: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lowshot(
    train: Features,
    test: Features,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    regularisation: float = REGULARISATION,
) -> LowshotResult:
    """Train on ``fraction`` (0.01, 0.1) of each class or on ``per_class`` images of it, and test; once a seed.

    Features are L2-normalised, as in MSN's low-shot protocol, so that ``regularisation`` means the same for every
    network. The subsets are ``balanced_subset``'s. Runs on the device the features are on.

    MisuseError: a test class that the training set lacks, a class with too few images, no seed.
    """
    if not seeds:
        raise MisuseError("a low-shot evaluation needs at least one seed")
    test = same_classes(train, test)
    queries = F.normalize(test.features)
    accuracies = []
    num_train = 0
    for seed in seeds:
        subset = train.rows(balanced_subset(train.labels, fraction=fraction, per_class=per_class, seed=seed))
        model = fit_logistic(Features(F.normalize(subset.features), subset.labels, train.classes), regularisation)
        hits = model.logits(queries).argmax(1) == test.labels
        accuracies.append(100 * hits.double().mean().item())
        num_train = len(subset)
    return LowshotResult(
        fraction,
        per_class,
        tuple(seeds),
        tuple(accuracies),
        mean(accuracies),
        stdev(accuracies) if len(accuracies) > 1 else None,
        regularisation,
        num_train,
        len(test),
    )
