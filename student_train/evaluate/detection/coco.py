"""COCO's ``instances`` files, read as what they should be: every field that is used is checked, ids are made anew."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ....common.errors import MisuseError
from ....common.files import read_regular
from ....common.records import DamagedError, parsed, typed

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
    try:
        content = typed(Coco, parsed(read_regular(path, LARGEST)))
    except DamagedError as problem:
        raise MisuseError(f"{path} is not an annotation file of COCO: it {problem}") from None
    except OSError as error:
        raise MisuseError(f"{path} cannot be read: {error.strerror}") from None
    return content, folder / split
