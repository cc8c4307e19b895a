"""Average precision of detections, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's AP (mean over IoU 0.50 ... 0.95), AP at 0.50 and at 0.75, in percent; None where there is no object."""

    ap: float | None
    ap50: float | None
    ap75: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def average_precision(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: Literal["bbox", "segm"] = "bbox"
) -> AveragePrecision:
    """``truth`` is COCO's dictionary, ``detections`` its result records, ``kind`` is bbox or segm."""
    return precision_by_class(truth, detections, kind)[0]


def precision_by_class(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: Literal["bbox", "segm"] = "bbox"
) -> tuple[AveragePrecision, dict[str, float | None]]:
    """``average_precision``, and the AP of each class by its name, of which it is the mean."""
    # pycocotools writes into what it is given.
    truth = {**truth, "annotations": [dict(thing) for thing in truth["annotations"]]}
    detections = [dict(detection) for detection in detections]
    names = {category["id"]: category["name"] for category in truth["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        objects = COCO()
        objects.dataset = cast(Any, truth)
        objects.createIndex()
        if not detections:
            there = {thing["category_id"] for thing in truth["annotations"]}
            nothing = 0.0 if there else None
            found = {name: 0.0 if category in there else None for category, name in names.items()}
            return AveragePrecision(nothing, nothing, nothing), found
        evaluation = COCOeval(objects, objects.loadRes(cast(Any, detections)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][
        ..., 0, -1
    ]  # (IoU, recall, class) of objects of any size; -1: there are none
    columns = zip(evaluation.params.catIds, np.moveaxis(precision, 2, 0), strict=True)
    by_class = {names[category]: _percent(values.mean()) for category, values in columns}
    return AveragePrecision(*map(_percent, evaluation.stats[:3])), by_class


def _percent(share: float) -> float | None:
    return 100 * float(share) if share >= 0 else None
