"""Detection data in COCO's or VOC's layout, read as one thing: COCO's dictionary, checked, and tensors made from it."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ....common.errors import FailureError, MisuseError
from ....common.files import is_inside, read_regular
from ....common.images.reading import MOST_PIXELS, BadImage, quiet_pillow, read_pixels
from .coco import LARGEST, read_coco
from .masks import UnusableError, checked_segmentation, draw_mask
from .voc import read_voc

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
    left_out: tuple[str, ...] = ()
    """Sentences on objects that were left out."""

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
        found, read = sorted((folder / "ImageSets" / "Main").glob("*.txt")), read_voc
        splits = {path.stem: path for path in found}
    elif (folder / "annotations").is_dir():
        found, read = sorted((folder / "annotations").glob("instances_*.json")), read_coco
        splits = {path.stem.removeprefix("instances_"): path for path in found}
    else:
        raise MisuseError(f"{folder} has neither layout that rob reads. {LAYOUTS}")
    if split not in splits:
        raise MisuseError(f"{folder} has no split {split!r}: there are {', '.join(splits) or 'none'}")
    content, images = read(folder, split, splits[split])
    return _checked(content, splits[split], images)


# ==== checks ====


def _checked(content: dict[str, Any], path: Path, folder: Path) -> DetectionData:
    """MisuseError names what cannot be. Objects are numbered from 1, as pycocotools takes 0 for no match."""
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"]: category["name"] for category in content["categories"]}
    if not images:
        raise MisuseError(f"{path} has no image")
    for things, kind in ((content["images"], "image"), (content["categories"], "class")):
        ids = Counter(thing["id"] for thing in things)
        if len(ids) < len(things):
            raise MisuseError(f"{path} has two of {kind} {ids.most_common(1)[0][0]}: give each an id of its own")
    if len(set(categories.values())) < len(categories):
        raise MisuseError(f"{path} has two classes of one name: {Counter(categories.values()).most_common(1)[0][0]}")
    for image in content["images"]:
        _check_image(image, path, folder)
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    maskless = 0
    for place, annotation in enumerate(content["annotations"], 1):
        named = f"{path}: object {annotation.get('id', f'number {place}')}"
        image = images.get(annotation["image_id"])
        if image is None:
            raise MisuseError(f"{named} is of image {annotation['image_id']}, which is not there")
        if annotation["category_id"] not in categories:
            raise MisuseError(f"{named} is of class {annotation['category_id']}, which is not there")
        thing = {name: annotation[name] for name in ("image_id", "category_id")}
        box = _box_inside(annotation, image, path)
        area = annotation.get("area")
        thing |= {"id": place, "bbox": box, "iscrowd": int(bool(annotation.get("iscrowd")))}
        thing["area"] = box[2] * box[3] if area is None else area
        if annotation.get("segmentation") is not None:
            try:
                drawn = checked_segmentation(annotation["segmentation"], image["height"], image["width"])
            except UnusableError as problem:
                raise MisuseError(f"{named} {problem}") from None
            if drawn is None:
                maskless += 1
            else:
                thing["segmentation"] = drawn
        objects[image["id"]].append(thing)
    left_out: tuple[str, ...] = ()
    if any("segmentation" in thing for of_image in objects.values() for thing in of_image):
        bare = sum("segmentation" not in thing for of_image in objects.values() for thing in of_image)
        if bare and bare == maskless:  # else the data are of boxes alone
            left_out = (f"{path}: {bare} objects are left out, whose polygons have fewer than three corners",)
            objects = {n: [thing for thing in of if "segmentation" in thing] for n, of in objects.items()}
    return DetectionData(
        path.stem,
        folder,
        tuple(content["images"]),
        {number: tuple(of_image) for number, of_image in objects.items()},
        categories,
        tuple(sorted(categories.values())),
        left_out,
    )


def _check_image(image: dict[str, Any], path: Path, folder: Path) -> None:
    name, width, height = image["file_name"], image["width"], image["height"]
    if not is_inside(name):
        raise MisuseError(f"{path} names {name}, which is outside of {folder}")
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        raise MisuseError(f"{path}: image {name} is said to have {width} x {height} pixels, which cannot be")
    if not (folder / name).is_file():
        raise MisuseError(f"{path} names {name}, and there is no such file in {folder}")


def _box_inside(annotation: dict[str, Any], image: dict[str, Any], path: Path) -> list[float]:
    x, y, width, height = annotation["bbox"]
    right, bottom = image["width"], image["height"]
    inside = min(x, y) >= -ROUNDING and x + width <= right + ROUNDING and y + height <= bottom + ROUNDING
    if not (inside and min(width, height) >= 0):  # NaN compares false
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

    def check_sizes(self) -> None:
        """MisuseError or FailureError: an image that cannot be read, or is of another size than its annotation says."""
        for record in self.data.images:
            self._image(record)

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
            drawn = [draw_mask(a["segmentation"], record["height"], record["width"]) for a in objects]
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
            with quiet_pillow():
                pixels = np.array(read_pixels(read_regular(path, LARGEST)))
        except (OSError, BadImage) as error:
            raise FailureError(f"{path} cannot be read: {error}") from None
        if pixels.shape[:2] != (record["height"], record["width"]):
            raise MisuseError(
                f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, its annotation says "
                f"{record['width']} x {record['height']}"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
