"""Average precision of detections, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

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
    # pycocotools writes into what it is given.
    truth = {**truth, "annotations": [dict(thing) for thing in truth["annotations"]]}
    detections = [dict(detection) for detection in detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        objects = COCO()
        objects.dataset = cast(Any, truth)
        objects.createIndex()
        if not detections:
            return AveragePrecision(0.0, 0.0, 0.0) if truth["annotations"] else AveragePrecision(None, None, None)
        evaluation = COCOeval(objects, objects.loadRes(cast(Any, detections)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return AveragePrecision(*(100 * float(value) if value >= 0 else None for value in evaluation.stats[:3]))
