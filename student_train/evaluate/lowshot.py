"""Classification from few labels: logistic regression on the frozen features of small, fixed subsets."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import MisuseError
from ...common.weights import hash_weights
from .features import Features, same_classes
from .logistic import fit_logistic
from .subsets import balanced_subset

REGULARISATION = 1e-3
"""Fixed, since so few labels leave none to choose by. On CIFAR-10 with 1, 5 and 50 images a class, for an ImageNet
network's features as for raw pixels, it is about 1 point of the best of 1e-6 ... 1, which the test set would show."""


MSN_REGULARISATION = 2.5e-3
"""Over the number of images: MSN's command for few images a class (its script's own default is a tenth of it)."""


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Listed:
    """The images that ``file`` names, as ``subsets.listed_rows`` finds them; the same for every seed."""

    file: str
    ids: tuple[int, ...]

    def __str__(self) -> str:
        return self.file

    def rows(self, labels: Tensor, seed: int) -> Tensor:
        return torch.tensor(self.ids, device=labels.device)

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "fingerprint": hash_weights({"ids": torch.tensor(self.ids)})}


@dataclass(frozen=True)
class LowshotResult:
    """Accuracies in percent, one a seed, their mean and sample standard deviation (None for one seed)."""

    share: Share | Listed
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    mean: float
    deviation: float | None
    num_train: int
    num_test: int

    def to_json(self) -> dict[str, Any]:
        return {"labels": str(self.share), **vars(self), "share": self.share.to_json()}

    @classmethod
    def of(
        cls, share: Share | Listed, seeds: Sequence[int], top1: Sequence[float], num_train: int, num_test: int
    ) -> "LowshotResult":
        deviation = stdev(top1) if len(top1) > 1 else None
        return cls(share, tuple(seeds), tuple(top1), mean(top1), deviation, num_train, num_test)


def lowshot(
    train: Features,
    test: Features,
    share: Share | Listed,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    regularisation: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    protocol: str = "usual",
) -> LowshotResult:
    """Train on ``share`` of the labels, and test; once a seed.

    Features are L2-normalised, so that ``regularisation`` (None: the protocol's) means the same for every network. With
    ``protocol`` "msn" it is MSN's released logistic regression: each row less its mean, then L2-normalised, no intercept,
    ``regularisation`` over the number of images; to the optimum, where theirs ends within a tolerance of 1e-3. The subsets
    are ``balanced_subset``'s. Runs on the device the features are on, unless that has no float64 (mps).

    MisuseError: a test class that the training set lacks, a class with too few images, no seed.
    """
    if not seeds:
        raise MisuseError("a low-shot evaluation needs at least one seed")
    if train.features.device.type == "mps":
        train, test = train.to("cpu"), test.to("cpu")
    test = same_classes(train, test)
    msn = protocol == "msn"
    queries = prepared(test.features, msn)
    accuracies = []
    num_train = 0
    for seed in seeds:
        subset = train.rows(share.rows(train.labels, seed))
        rows = Features(prepared(subset.features, msn), subset.labels, train.classes)
        if msn:
            strength = (MSN_REGULARISATION if regularisation is None else regularisation) / len(subset)
        else:
            strength = REGULARISATION if regularisation is None else regularisation
        model = fit_logistic(rows, strength, intercept=not msn)
        hits = model.logits(queries).argmax(1) == test.labels
        accuracies.append(100 * hits.double().mean().item())
        num_train = len(subset)
        if progress:
            progress(len(accuracies), len(seeds))
    return LowshotResult.of(share, seeds, accuracies, num_train, len(test))


def prepared(features: Tensor, centred: bool) -> Tensor:
    """(N, D) unit rows, each less its own mean before if ``centred``."""
    return F.normalize(features - features.mean(1, keepdim=True) if centred else features)
