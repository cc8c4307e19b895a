"""VOC's lists of images and their XML files, read as COCO's dictionary."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from ....common.errors import MisuseError
from ....common.files import is_inside, read_regular
from ....common.images.reading import EXTENSIONS

LARGEST = 1 << 26
"""Bytes of a list, or of an image's XML."""


def read_voc(folder: Path, split: str, path: Path) -> tuple[dict[str, Any], Path]:
    """COCO's dictionary and the folder of the images.

    VOC counts pixels from 1 and its boxes' last ones are inside; what is difficult counts as COCO's crowds: found or not, it is
    no matter. MisuseError: an XML file is missing or none of VOC's, or an image is.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for number, line in enumerate(read_regular(path, LARGEST).decode("utf-8-sig", "surrogateescape").split("\n")):
        if not line.strip():
            continue
        name = _name(folder, line.strip(), path)
        file = folder / "Annotations" / f"{name}.xml"
        try:
            root = ElementTree.fromstring(read_regular(file, LARGEST))
            width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
            file_name = _image(folder / "JPEGImages", name, root.findtext("filename"), path)
            images.append({"id": number, "file_name": file_name, "width": width, "height": height})
            for thing in root.iter("object"):
                left, top, right, bottom = (
                    float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                category = numbers.setdefault(_text(thing, "name"), len(numbers) + 1)
                annotations.append(
                    {
                        "image_id": number,
                        "category_id": category,
                        "bbox": (left - 1, top - 1, right - left + 1, bottom - top + 1),
                        "iscrowd": int(thing.findtext("difficult") or 0),
                    }
                )
        except FileNotFoundError:
            raise MisuseError(f"{path} names {name}, and {file} is missing") from None
        except (ElementTree.ParseError, ValueError, OSError) as error:
            raise MisuseError(f"{file} is not an annotation file of VOC: {error}") from None
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, folder / "JPEGImages"


def _name(folder: Path, line: str, path: Path) -> str:
    """The image that a line names: all of it, or what stands before the `` 1`` or `` -1`` of a list of one class."""
    whole, flagged = line, re.fullmatch(r"(.*\S)\s+-?[01]", line)
    if flagged and (".." in line or not (folder / "Annotations" / f"{line}.xml").exists()):
        whole = flagged[1]
    if not is_inside(whole):
        raise MisuseError(f"{path} names {whole}, which is outside of {folder}")
    return whole


def _image(folder: Path, name: str, told: str | None, path: Path) -> str:
    """The image's file name: what the XML says, where there is such a file, else the list's name with an image's ending."""
    endings = [case for ending in EXTENSIONS for case in (ending, ending.upper())]
    for candidate in ([told.strip()] if told and is_inside(told.strip()) else []) + [
        name + ending for ending in endings
    ]:
        if (folder / candidate).is_file():
            return candidate
    return f"{name}.jpg"  # which is then said to be missing


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path} in <{element.tag}>")
    return text.strip()
