"""COCO's segmentations: polygons, or run lengths packed or not, checked before pycocotools, which is C, sees them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

POLYGON = 6
"""Numbers of the least polygon: three corners."""


class UnusableError(ValueError):
    """What a segmentation is, in words that follow the object's name."""


def checked_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """The part of a segmentation that draws something, None where nothing does. UnusableError: it is none, or of another size."""
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and _are_numbers(polygon) for polygon in segmentation):
            raise UnusableError("has a polygon that is no list of numbers")
        polygons = [polygon for polygon in segmentation if len(polygon) >= POLYGON and len(polygon) % 2 == 0]
        return polygons or None
    if not isinstance(segmentation, Mapping) or not {"size", "counts"} <= segmentation.keys():
        raise UnusableError("has a segmentation that is neither polygons nor run lengths")
    if segmentation["size"] != [height, width]:
        size = _short(segmentation["size"])
        raise UnusableError(f"has run lengths of size {size}, and its image is {height} high, {width} wide")
    counts = segmentation["counts"]
    runs = _unpacked(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(n) is int and n >= 0 for n in runs) or sum(runs) != height * width:
        raise UnusableError(f"has run lengths that do not cover its image of {height} x {width} pixels")
    return {"size": [height, width], "counts": counts}


def draw_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A checked segmentation as (height, width) uint8."""
    if isinstance(segmentation, list):
        packed = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        packed = coco_mask.frPyObjects(segmentation, height, width)
    else:
        packed = segmentation
    return coco_mask.decode(packed)


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e6 for value in values)  # NaN compares false


def _unpacked(text: str) -> list[int] | None:
    """The run lengths of COCO's packed form: 5 bits a character from "0", the sixth says that more follow, each number but the
    first two the difference to the last but one. None: it is none.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return None if shift else runs


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:30]} ..."
