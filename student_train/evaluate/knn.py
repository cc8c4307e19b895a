"""Weighted k-nearest-neighbour classification of frozen features, as DINO's ``eval_knn.py`` defines it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import MisuseError
from ...common.run import exact_products, free_memory
from .features import Features, same_classes

SIMILARITY_BYTES = 64_000_000
"""Of the float32 similarities held at a time, test rows of a batch times all training rows, on a CPU. A GPU may take a
sixteenth of what it has free: with ImageNet's rows, 64 MB would be a dozen test images a launch."""


@dataclass(frozen=True)
class KnnResult:
    """Accuracies in percent of one ``k``; top-5 is over fewer where fewer classes are there, or have a vote."""

    k: int
    temperature: float
    top1: float
    top5: float
    num_train: int
    num_test: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def knn(train: Features, test: Features, k: int = 20, temperature: float = 0.07) -> KnnResult:
    """DINO's published setting by default; see ``knn_sweep``."""
    return knn_sweep(train, test, (k,), temperature)[0]


def knn_sweep(
    train: Features, test: Features, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07
) -> tuple[KnnResult, ...]:
    """Each ``k``'s accuracy from one search: of the k training images of greatest cosine, each votes exp(cosine / tau).

    Runs on the device the features are on. MisuseError: k outside 1..N, or a test class that the training set lacks.
    """
    results = []
    for k, hits in zip(ks, _hits(train, test, ks, temperature), strict=True):
        top1, top5 = (count / len(test) for count in torch.stack([hits[:, 0].sum(), hits.any(1).sum()]).tolist())
        results.append(KnnResult(k, temperature, 100 * top1, 100 * top5, len(train), len(test)))
    return tuple(results)


def knn_hits(train: Features, test: Features, k: int = 20, temperature: float = 0.07) -> Tensor:
    """(N_test,) bool: which of the test images ``knn`` gives their label. MisuseError as ``knn_sweep``."""
    return next(_hits(train, test, (k,), temperature))[:, 0]


def _hits(train: Features, test: Features, ks: Sequence[int], temperature: float) -> Iterator[Tensor]:
    """For each ``k`` (N_test, 5) bool, or fewer columns: whether an image's label is its first vote, its second ..."""
    test = same_classes(train, test)
    for k in ks:
        if not 1 <= k <= len(train):
            raise MisuseError(f"k = {k} neighbours of {len(train)} training images: choose k from 1 to {len(train)}")
    similarities, votes = nearest_labels(train, test, max(ks))
    # Relative to the nearest, none overflows; and every vote counts for more than none.
    weights = ((similarities - similarities[:, :1]) / temperature).exp().clamp_min(torch.finfo(similarities.dtype).tiny)
    for k in ks:
        scores = weights.new_zeros(len(test), train.num_classes).scatter_add_(1, votes[:, :k], weights[:, :k])
        best = scores.topk(min(5, train.num_classes))
        yield (best.indices == test.labels[:, None]) & (best.values > 0)  # a class without a vote is no answer


def nearest_labels(train: Features, test: Features, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (N_test, k), greatest first, and the labels (N_test, k) of each test row's nearest training rows."""
    keys, queries = F.normalize(train.features), F.normalize(test.features)
    batch = max(1, similarity_bytes(keys.device) // (4 * len(keys)))
    with exact_products():
        found = [(rows @ keys.T).topk(k) for rows in queries.split(batch)]
    similarities = torch.cat([values for values, _ in found])
    neighbours = torch.cat([indices for _, indices in found])
    return similarities, train.labels[neighbours]


def similarity_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return SIMILARITY_BYTES
    return max(SIMILARITY_BYTES, (free_memory(device) or 0) // 16)
