"""How much of torch's features is in a file's: cosines, neighbours, and the k-NN accuracy that is left."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import FailureError
from .boxes import BoxAgreement

K, TEMPERATURE = 10, 0.07
NEAR = 5
MIN_FLOAT, MIN_INT8_LABELLED, MIN_INT8 = 0.9999, 0.97, 0.9
MIN_OF_A_CLASS = 5
"""Images of a class, on average, from which on k-NN says something."""


@dataclass(frozen=True)
class Agreement:
    """Of ``images`` images. ``neighbours`` is the share of images whose nearest neighbour is among torch's five nearest; ``knn``
    and ``knn_torch`` are top-1 in percent, each image by its 10 nearest among the others; None without labels.

    Of logits there are no neighbours (1): ``same`` is the share of images, or of pixels, of torch's class, and ``top1`` and
    ``top1_torch`` are the classifier's in percent, None without labels.
    """

    images: int
    lowest_cosine: float
    mean_cosine: float
    neighbours: float
    knn: float | None
    knn_torch: float | None
    same: float | None = None
    top1: float | None = None
    top1_torch: float | None = None

    def score(self, int8: bool) -> float:
        """What ``min_agreement`` is held against."""
        if not int8:
            return self.lowest_cosine
        if self.same is not None:
            return self.same if self.top1 is None else min(1.0, 1 - ((self.top1_torch or 0.0) - self.top1) / 100)
        if self.knn is None or self.knn_torch is None:
            return self.neighbours
        return min(1.0, 1 - (self.knn_torch - self.knn) / 100)

    def lowest_score(self, int8: bool) -> float:
        """The least that is expected where nothing else is asked for."""
        if not int8:
            return MIN_FLOAT
        return MIN_INT8 if self.knn is None and self.top1 is None else MIN_INT8_LABELLED

    def told(self, int8: bool) -> str:
        """The score in words."""
        if not int8:
            return f"the smallest cosine with torch's output is {self.lowest_cosine:.6f}"
        score = self.score(int8)
        if self.same is not None and self.top1 is not None:
            return f"top-1 falls from {self.top1_torch:.2f} to {self.top1:.2f} %, an agreement of {score:.4f}"
        if self.same is not None:
            return f"the class is torch's for {score:.2%} of what is classified"
        if self.knn is not None:
            return f"k-NN top-1 falls from {self.knn_torch:.2f} to {self.knn:.2f} %, an agreement of {score:.4f}"
        return f"the nearest neighbour is among torch's five for {score:.2%} of the images"


def agreement(found: Tensor, torchs: Tensor, labels: Tensor | None) -> Agreement:
    """Compare features (N, D) of the same images. labels: (N,) int64, or None."""
    cosines = F.cosine_similarity(found.double(), torchs.double(), dim=1)
    near, near_torch = _similarities(found), _similarities(torchs)
    kept = near_torch.topk(min(NEAR, len(found) - 1)).indices == near.argmax(1, keepdim=True)
    if labels is not None and (labels.min() < 0 or len(labels) < MIN_OF_A_CLASS * len(labels.unique())):
        labels = None
    return Agreement(
        images=len(found),
        lowest_cosine=cosines.min().item(),
        mean_cosine=cosines.mean().item(),
        neighbours=kept.any(1).double().mean().item(),
        knn=None if labels is None else _knn_top1(near, labels),
        knn_torch=None if labels is None else _knn_top1(near_torch, labels),
    )


def agreement_of_logits(found: Tensor, torchs: Tensor, labels: Tensor | None) -> Agreement:
    """Compare logits (N, C), or (N, C, S, S) of pixels, of the same images. labels: (N,) int64, or None."""
    cosines = F.cosine_similarity(found.double().flatten(1), torchs.double().flatten(1), dim=1)
    classes, classes_torch = found.argmax(1), torchs.argmax(1)

    def top1(classes: Tensor) -> float | None:
        return None if labels is None else 100 * (classes == labels).double().mean().item()

    return Agreement(
        images=len(found),
        lowest_cosine=cosines.min().item(),
        mean_cosine=cosines.mean().item(),
        neighbours=1.0,
        knn=None,
        knn_torch=None,
        same=(classes == classes_torch).double().mean().item(),
        top1=top1(classes),
        top1_torch=top1(classes_torch),
    )


def _similarities(features: Tensor) -> Tensor:
    """Cosines (N, N); an image is not its own neighbour."""
    unit = F.normalize(features.float(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf)


def _knn_top1(similarities: Tensor, labels: Tensor) -> float:
    values, neighbours = similarities.topk(min(K, len(labels) - 1))
    weights = ((values - values[:, :1]) / TEMPERATURE).exp()
    scores = weights.new_zeros(len(labels), int(labels.max()) + 1).scatter_add_(1, labels[neighbours], weights)
    return 100 * (scores.argmax(1) == labels).double().mean().item()


def hold(found: Agreement | BoxAgreement, int8: bool, asked: float | None, name: str) -> None:
    """FailureError: less agreement than asked for. Written so that NaN is less."""
    least = found.lowest_score(int8) if asked is None else asked
    if not found.score(int8) >= least:
        raise FailureError(
            f"{name} is not kept: on {found.images} images {found.told(int8)}, and {least:g} is expected (`min_agreement`)"
        )
