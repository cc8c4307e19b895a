"""Mean intersection over union, from a confusion matrix of all pixels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .data import IGNORED


@dataclass(frozen=True)
class SegmentationScore:
    """In percent, of all pixels that are not ignored. ``iou`` of a class is None where it is neither there nor found, and such a
    class is not in the mean, as torchmetrics' JaccardIndex has it.
    """

    miou: float
    pixel_accuracy: float
    iou: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Confusion:
    """Counts pixels: ``matrix`` (C, C) int64, row the true class, column the one found, on ``device``."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)

    def add(self, found: Tensor, labels: Tensor) -> None:
        """found, labels: integers of one shape, 0 ... C - 1; where labels are ``IGNORED`` nothing is counted."""
        kept = labels != IGNORED
        pairs = labels[kept].long() * len(self.matrix) + found[kept].long()
        self.matrix += torch.bincount(pairs, minlength=self.matrix.numel()).view_as(self.matrix)

    def score(self, classes: Sequence[str]) -> SegmentationScore:
        """Intersection over union of each class, and their mean over the whole set."""
        counts = self.matrix.cpu().double()
        hits = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - hits
        iou = 100 * hits / union  # NaN where there is none
        return SegmentationScore(
            miou=iou.nanmean().item(),
            pixel_accuracy=(100 * hits.sum() / counts.sum()).item(),
            iou={
                name: value if pixels else None
                for name, value, pixels in zip(classes, iou.tolist(), union.tolist(), strict=True)
            },
        )
