"""Images with a class for every pixel, whatever layout they came in: read, checked, and counted alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....common.errors import FailureError, MisuseError
from ....common.files import read_regular
from ....common.images.reading import BadImage, open_image, quiet_pillow, read_pixels, upright
from ..detection.masks import draw_mask

IGNORED = 255
"""The label of a pixel that counts neither in training nor in testing."""
LARGEST = 1 << 32
"""Bytes of an image's or a mask's file."""
ONE_NUMBER_A_PIXEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of a mask."""


@dataclass(frozen=True)
class Drawn:
    """A mask of polygons: ``objects`` are (label, checked segmentation), each drawn over those before it."""

    height: int
    width: int
    objects: tuple[tuple[int, Any], ...]


@dataclass(frozen=True)
class SegmentationData:
    """Images and their masks, row by row. A label is an index into ``classes``, or ``IGNORED``."""

    name: str
    """As a sentence names it."""
    images: tuple[Path, ...]
    masks: tuple[Path | Drawn, ...]
    """A file of one number a pixel, or what is drawn."""
    classes: tuple[str, ...]
    numbers: Mapping[int, int]
    """What a mask file says of a pixel -> its label; else it is unknown."""
    classes_from: str
    """Where the classes are listed, for a sentence."""
    named: bool = True
    """Whether they have names, or go by the values that were found."""
    left_out: tuple[str, ...] = ()
    """Sentences on what was left out."""

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright. FailureError: it cannot be read."""
        path = self.images[row]
        try:
            with quiet_pillow():
                return np.array(read_pixels(read_regular(path, LARGEST)))
        except (OSError, BadImage) as error:
            raise FailureError(f"{path} cannot be read: {error}") from None

    def labels(self, row: int) -> np.ndarray:
        """(H, W) uint8. MisuseError: the mask cannot be read, is a colour picture, or has a value that stands for nothing."""
        mask = self.masks[row]
        if isinstance(mask, Drawn):
            labels = np.zeros((mask.height, mask.width), np.uint8)
            for label, segmentation in mask.objects:
                labels[draw_mask(segmentation, mask.height, mask.width) > 0] = label
            return labels
        values = read_mask(mask)
        table = np.full(max(self.numbers) + 2, -1)  # its last entry is of whatever is unknown
        table[list(self.numbers)] = list(self.numbers.values())
        labels = table[values.clip(-1, len(table) - 1)]
        if labels.min() < 0:
            raise MisuseError(
                f"{mask} has pixels of {values[labels < 0][0]}, and {self.classes_from} knows {_listed(self.numbers)}: add the "
                f"class, or make them {IGNORED}, which is ignored"
            )
        return labels.astype(np.uint8)

    def counts(self, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Pixels of each class, (C,) int64, after a look at every image's header and every mask, so that what is wrong is said
        before anything is trained.

        MisuseError: as ``labels``, a mask of another size than its image, or no pixel of any class. FailureError: as ``image``.
        """
        total = np.zeros(len(self.classes), np.int64)
        for row in range(len(self)):
            labels = self.labels(row)
            width, height = image_size(self.images[row])
            if labels.shape != (height, width):
                mask = self.masks[row]
                named = f"{self.name}: the annotation" if isinstance(mask, Drawn) else str(mask)
                raise MisuseError(
                    f"{named} is of {labels.shape[1]} x {labels.shape[0]} pixels, and {self.images[row]} has {width} x {height}: "
                    "a mask has the size of its image"
                )
            total += np.bincount(labels.ravel(), minlength=256)[: len(total)]
            if progress:
                progress(row + 1, len(self))
        if not total.any():
            raise MisuseError(f"{self.name} has no labels: every pixel of its {len(self)} masks is ignored")
        return total

    def with_classes_of(self, train: "SegmentationData", train_counts: np.ndarray) -> "SegmentationData":
        """The same with ``train``'s labels, by the names of classes, or by value where one of the two has no names.

        MisuseError: as ``counts``, or a pixel of a class of which ``train`` has none. ``train_counts`` are its ``counts``.
        """
        if self.named != train.named:
            by_value = replace(
                self, numbers=train.numbers, classes=train.classes, classes_from=train.classes_from, named=train.named
            )
            return by_value.with_classes_of(train, train_counts)
        known = {name for name, pixels in zip(train.classes, train_counts, strict=True) if pixels}
        for name, pixels in zip(self.classes, self.counts(), strict=True):
            if pixels and name not in known:
                raise MisuseError(f"class {name!r} of {self.name} has no pixel in {train.name}")
        new = [train.classes.index(name) if name in known else IGNORED for name in self.classes] + [IGNORED]
        numbers = {value: new[min(label, len(self.classes))] for value, label in self.numbers.items()}
        masks = tuple(
            replace(mask, objects=tuple((new[min(label, len(self.classes))], drawn) for label, drawn in mask.objects))
            if isinstance(mask, Drawn)
            else mask
            for mask in self.masks
        )
        return replace(self, masks=masks, numbers=numbers, classes=train.classes)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) integers of a file of one number a pixel. MisuseError: it cannot be read, or is a colour picture."""
    try:
        with quiet_pillow():
            image = upright(open_image(read_regular(path, LARGEST)))
    except (OSError, BadImage) as error:
        raise MisuseError(f"{path} cannot be read: {error}") from None
    if image.mode not in ONE_NUMBER_A_PIXEL:
        raise MisuseError(
            f"{path} is a picture of mode {image.mode}, and a mask has one number a pixel, its class: save it as 8-bit grey or "
            "palette PNG"
        )
    return np.array(image).astype(np.int32)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as it is seen, by its header. FailureError: it cannot be read."""
    try:
        with quiet_pillow(), Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else (image.width, image.height)
    except Exception as error:  # Pillow's readers raise about every kind on broken files
        raise FailureError(f"{path} cannot be read: {error}") from None


def _listed(numbers: Mapping[int, int]) -> str:
    """``0 to 20``, or the values one by one where they have gaps; the ignored one is not said."""
    values = sorted(value for value, label in numbers.items() if label != IGNORED)
    if values and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:20])) + (" ..." if len(values) > 20 else "")
