"""Detection data in COCO's or VOC's layout, read as one thing: COCO's dictionary, checked, and tensors made from it."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from ....common.errors import FailureError, MisuseError

ROUNDING = 1.0
"""Pixels that a box may reach over its image's edge, from rounding or a convention of counting: it is cut off."""

LAYOUTS = (
    "VOC: ImageSets/Main/NAME.txt, Annotations/*.xml, JPEGImages/*.jpg; "
    "COCO: annotations/instances_NAME.json and images in NAME/"
)


@dataclass(frozen=True)
class DetectionData:
    """Images with boxes, as COCO's ``instances`` dictionary has them: boxes are x, y, width, height in pixels from 0.

    ``classes`` in the order of the model's labels, which count from 1 (0 is the background).
    """

    name: str
    folder: Path
    images: tuple[dict[str, Any], ...]
    annotations: dict[int, tuple[dict[str, Any], ...]]
    """Image id -> its objects."""
    categories: dict[int, str]
    classes: tuple[str, ...]

    @property
    def has_masks(self) -> bool:
        objects = [a for of_image in self.annotations.values() for a in of_image]
        return bool(objects) and all(a.get("segmentation") for a in objects)

    def label(self, category: int) -> int:
        return self.classes.index(self.categories[category]) + 1

    def category(self, label: int) -> int:
        """The data's own id of a model's label; -1 for a class that these data do not know."""
        name = self.classes[label - 1]
        return next((category for category, known in self.categories.items() if known == name), -1)

    def with_classes_of(self, train: "DetectionData") -> "DetectionData":
        """The same data with ``train``'s labels. MisuseError: an object of a class that ``train`` lacks."""
        used = {self.categories[a["category_id"]] for of_image in self.annotations.values() for a in of_image}
        unknown = sorted(used - set(train.classes))
        if unknown:
            raise MisuseError(f"class {unknown[0]!r} of {self.name} is not in {train.name}")
        return replace(self, classes=train.classes)

    def to_coco(self) -> dict[str, Any]:
        """What pycocotools reads."""
        return {
            "info": {},
            "images": list(self.images),
            "annotations": [a for of_image in self.annotations.values() for a in of_image],
            "categories": [{"id": number, "name": name} for number, name in self.categories.items()],
        }


def open_detection(folder: Path, split: str) -> DetectionData:
    """The images of one list of a VOC folder, or of one annotation file of a COCO folder.

    MisuseError: neither layout, no such split, no image, a file that cannot be read as what it should be, an image that
    is missing, a box outside its image or an object of no known class.
    """
    if not folder.is_dir():
        raise MisuseError(f"{folder}: no such folder; detection data are laid out as {LAYOUTS}")
    if (folder / "ImageSets" / "Main").is_dir():
        found, read = sorted((folder / "ImageSets" / "Main").glob("*.txt")), _read_voc
        splits = {path.stem: path for path in found}
    elif (folder / "annotations").is_dir():
        found, read = sorted((folder / "annotations").glob("instances_*.json")), _read_coco
        splits = {path.stem.removeprefix("instances_"): path for path in found}
    else:
        raise MisuseError(f"{folder} has neither layout that rob reads. {LAYOUTS}")
    if split not in splits:
        raise MisuseError(f"{folder} has no split {split!r}: there are {', '.join(splits) or 'none'}")
    content, images = read(folder, split, splits[split])
    return _checked(content, splits[split], images)


# ==== the two layouts ====


def _read_coco(folder: Path, split: str, path: Path) -> tuple[dict[str, Any], Path]:
    try:
        content = json.loads(path.read_text())
        _ = content["images"], content["annotations"], content["categories"]
    except (ValueError, KeyError, TypeError) as error:
        raise MisuseError(f"{path} is not an annotation file of COCO: {error!r}") from None
    return content, folder / split


def _read_voc(folder: Path, split: str, path: Path) -> tuple[dict[str, Any], Path]:
    """VOC counts pixels from 1 and its boxes' last ones are inside; what is difficult counts as COCO's crowds: found or
    not, it is no matter.
    """
    images, annotations, numbers = [], [], {}
    for number, line in enumerate(path.read_text().split("\n")):
        if not (words := line.split()):
            continue
        file = folder / "Annotations" / f"{words[0]}.xml"
        try:
            root = ElementTree.parse(file).getroot()
            width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
            images.append({"id": number, "file_name": f"{words[0]}.jpg", "width": width, "height": height})
            for thing in root.iter("object"):
                left, top, right, bottom = (
                    float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
                category = numbers.setdefault(_text(thing, "name"), len(numbers) + 1)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": int(thing.findtext("difficult") or 0),
                    }
                )
        except FileNotFoundError:
            raise MisuseError(f"{path} names {words[0]}, and {file} is missing") from None
        except (ElementTree.ParseError, ValueError) as error:
            raise MisuseError(f"{file} is not an annotation file of VOC: {error}") from None
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, folder / "JPEGImages"


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path} in <{element.tag}>")
    return text.strip()


def _checked(content: dict[str, Any], path: Path, folder: Path) -> DetectionData:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"]: category["name"] for category in content["categories"]}
    if not images:
        raise MisuseError(f"{path} has no image")
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            raise MisuseError(
                f"{path}: object {annotation['id']} is of image {annotation['image_id']}, which is not there"
            )
        if annotation["category_id"] not in categories:
            raise MisuseError(
                f"{path}: object {annotation['id']} is of class {annotation['category_id']}, which is not there"
            )
        objects[image["id"]].append({**annotation, "bbox": _box_inside(annotation, image, path)})
    for image in content["images"]:
        if not (folder / image["file_name"]).is_file():
            raise MisuseError(f"{path} names {image['file_name']}, and there is no such file in {folder}")
    return DetectionData(
        path.stem,
        folder,
        tuple(content["images"]),
        {number: tuple(of_image) for number, of_image in objects.items()},
        categories,
        tuple(sorted(categories.values())),
    )


def _box_inside(annotation: dict[str, Any], image: dict[str, Any], path: Path) -> list[float]:
    x, y, width, height = annotation["bbox"]
    right, bottom = image["width"], image["height"]
    if (
        min(x, y) < -ROUNDING
        or x + width > right + ROUNDING
        or y + height > bottom + ROUNDING
        or min(width, height) < 0
    ):
        raise MisuseError(
            f"{path}: a box of {image['file_name']} lies outside it: x {x:g} to {x + width:g}, y {y:g} to {y + height:g} "
            f"in an image of {right} x {bottom}"
        )
    left, top = max(x, 0.0), max(y, 0.0)
    return [left, top, min(x + width, right) - left, min(y + height, bottom) - top]


# ==== tensors ====


class DetectionTensors(Dataset):
    """Item i: image (3, H, W) float32 in [0, 1], and torchvision's target: ``boxes`` (n, 4) float32 left, top, right,
    bottom; ``labels`` (n,) int64; ``masks`` (n, H, W) uint8 with ``masks``; ``image_id``.

    Crowds and boxes of no area are left out, as nothing can be learned from them. With ``flips``, item i is mirrored
    where that is true.
    """

    def __init__(self, data: DetectionData, masks: bool, flips: Tensor | None = None) -> None:
        self.data, self.masks, self.flips = data, masks, flips

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.data.images[index]
        image = self._image(record)
        objects = [
            a
            for a in self.data.annotations[record["id"]]
            if not a.get("iscrowd") and min(a["bbox"][2], a["bbox"][3]) > 0
        ]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: dict[str, Any] = {
            "boxes": boxes,
            "labels": torch.tensor([self.data.label(a["category_id"]) for a in objects], dtype=torch.int64),
            "image_id": record["id"],
        }
        if self.masks:
            drawn = [_draw(a["segmentation"], record["height"], record["width"]) for a in objects]
            target["masks"] = torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *image.shape[1:]).byte()
        if self.flips is not None and self.flips[index]:
            image = image.flip(-1)
            boxes[:, [0, 2]] = record["width"] - boxes[:, [2, 0]]
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target

    def _image(self, record: dict[str, Any]) -> Tensor:
        path = self.data.folder / record["file_name"]
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB"))
        except OSError as error:
            raise FailureError(f"{path} cannot be read: {error}") from None
        if pixels.shape[:2] != (record["height"], record["width"]):
            raise MisuseError(
                f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, its annotation says "
                f"{record['width']} x {record['height']}"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def _draw(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons, or run lengths packed or not, as (height, width) uint8."""
    if isinstance(segmentation, list):
        packed = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        packed = coco_mask.frPyObjects(segmentation, height, width)
    else:
        packed = segmentation
    return coco_mask.decode(packed)
