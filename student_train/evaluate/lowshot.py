"""Classification from few labels: logistic regression on the frozen features of small, fixed subsets."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...common.errors import MisuseError
from .features import Features, same_classes
from .logistic import fit_logistic
from .subsets import balanced_subset

REGULARISATION = 1e-3
"""Fixed, since so few labels leave none to choose by. On CIFAR-10 with 1, 5 and 50 images a class, for an ImageNet
network's features as for raw pixels, it is about 1 point of the best of 1e-6 ... 1, which the test set would show."""


@dataclass(frozen=True)
class Share:
    """How many labels: a ``fraction`` (0.01, 0.1) of each class, or ``per_class`` images of it."""

    fraction: float | None = None
    per_class: int | None = None

    def __str__(self) -> str:
        return f"{100 * self.fraction:g} %" if self.fraction is not None else f"{self.per_class} a class"

    def rows(self, labels: Tensor, seed: int) -> Tensor:
        """Those of ``balanced_subset``."""
        return balanced_subset(labels, fraction=self.fraction, per_class=self.per_class, seed=seed)


@dataclass(frozen=True)
class LowshotResult:
    """Accuracies in percent, one a seed, their mean and sample standard deviation (None for one seed)."""

    share: Share
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    mean: float
    deviation: float | None
    num_train: int
    num_test: int

    def to_json(self) -> dict[str, Any]:
        return {"labels": str(self.share), **asdict(self)}

    @classmethod
    def of(
        cls, share: Share, seeds: Sequence[int], top1: Sequence[float], num_train: int, num_test: int
    ) -> "LowshotResult":
        deviation = stdev(top1) if len(top1) > 1 else None
        return cls(share, tuple(seeds), tuple(top1), mean(top1), deviation, num_train, num_test)


def lowshot(
    train: Features,
    test: Features,
    share: Share,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    regularisation: float = REGULARISATION,
    progress: Callable[[int, int], None] | None = None,
) -> LowshotResult:
    """Train on ``share`` of the labels, and test; once a seed.

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
        subset = train.rows(share.rows(train.labels, seed))
        model = fit_logistic(Features(F.normalize(subset.features), subset.labels, train.classes), regularisation)
        hits = model.logits(queries).argmax(1) == test.labels
        accuracies.append(100 * hits.double().mean().item())
        num_train = len(subset)
        if progress:
            progress(len(accuracies), len(seeds))
    return LowshotResult.of(share, seeds, accuracies, num_train, len(test))
