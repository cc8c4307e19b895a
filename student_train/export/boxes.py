"""What a detector finds in a picture, and how much of what torch's finds a file's does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

MIN_SAME = 0.99
MIN_IOU = 0.9
MAX_SCORE_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Boxes:
    """Of one picture: ``boxes`` (n, 4) float32, left, top, right, bottom in pixels; ``labels`` (n,) int64; ``scores`` (n,)
    float32; ``masks`` (n, H, W) float32, probabilities, None where the detector has none."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class BoxAgreement:
    """On ``images`` pictures: ``boxes`` is how many torch finds, ``same`` the share of boxes, of torch's and of the file's, that
    the other has, too: of the same class, of an intersection over union of ``MIN_IOU`` (masks as well), with scores within
    ``MAX_SCORE_DIFFERENCE``.

    ``lowest_iou`` and ``largest_difference``, of scores, are among these; None where there is none.
    """

    images: int
    boxes: int
    same: float
    lowest_iou: float | None
    largest_difference: float | None

    def score(self, int8: bool) -> float:
        """What ``min_agreement`` is held against."""
        return self.same

    def lowest_score(self, int8: bool) -> float:
        """The least that is expected where nothing else is asked for."""
        return MIN_SAME

    def told(self, int8: bool) -> str:
        return f"{self.same:.2%} of torch's {self.boxes} boxes and the file's are the same"


def agreement_of_boxes(found: Sequence[Boxes], torchs: Sequence[Boxes]) -> BoxAgreement:
    """Compare what was found in the same pictures."""
    total, ious, differences = 0, [], []
    for ours, theirs in zip(found, torchs, strict=True):
        total += len(ours.scores) + len(theirs.scores)
        overlap = box_iou(theirs.boxes, ours.boxes)
        difference = (theirs.scores[:, None] - ours.scores[None]).abs()
        alike = (overlap >= MIN_IOU) & (difference <= MAX_SCORE_DIFFERENCE)
        alike &= theirs.labels[:, None] == ours.labels[None]
        for row in range(len(theirs.scores)):
            candidates = torch.where(alike[row], overlap[row], -1.0)
            column = int(candidates.argmax()) if candidates.numel() else -1
            if column >= 0 and candidates[column] >= 0 and _mask_iou(theirs, row, ours, column) >= MIN_IOU:
                alike[:, column] = False  # each box once
                ious.append(overlap[row, column].item())
                differences.append(difference[row, column].item())
    return BoxAgreement(
        images=len(torchs),
        boxes=sum(len(boxes.scores) for boxes in torchs),
        same=2 * len(ious) / total if total else 1.0,
        lowest_iou=min(ious, default=None),
        largest_difference=max(differences, default=None),
    )


def _mask_iou(one: Boxes, row: int, other: Boxes, column: int) -> float:
    """1 where there are no masks, or nothing in either."""
    if one.masks is None or other.masks is None:
        return 1.0
    first, second = one.masks[row] > 0.5, other.masks[column] > 0.5
    joined = (first | second).sum().item()
    return (first & second).sum().item() / joined if joined else 1.0
