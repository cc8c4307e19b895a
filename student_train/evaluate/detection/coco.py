"""COCO's ``instances`` files, read as what they should be: every field that is used is checked, ids are made anew."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ....common.records import read_foreign

LARGEST = 1 << 32
"""Bytes of an annotation file."""


class CocoImage(TypedDict):
    id: int
    file_name: str
    width: int
    height: int


class CocoObject(TypedDict):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: NotRequired[int | bool | None]
    area: NotRequired[float | None]
    segmentation: NotRequired[Any]


class CocoCategory(TypedDict):
    id: int
    name: str


class Coco(TypedDict):
    """What is read of an annotation file."""

    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[CocoCategory]


def read_coco(folder: Path, split: str, path: Path) -> tuple[dict[str, Any], Path]:
    """The content of an annotation file and the folder of its images. MisuseError: a field that is used is missing, or is of
    another type."""
    content = read_foreign(path, Coco, "an annotation file of COCO", LARGEST)
    return dict(content), folder / split
