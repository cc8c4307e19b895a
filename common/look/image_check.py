"""What is worth knowing of packed images before they are trained or tested on, as facts, sentences and numbers.

Sentences name rows by the paths that they were packed from: the first few, and how many there are.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import some
from ..images.beton import Beton
from .config import ALIKE, Alike
from .duplicates import Duplicates, duplicates
from .thumbnails import Thumbnails, thumbnails

FEW = 10
"""Images of a class, below which it is named."""


@dataclass(frozen=True)
class ImageCheck:
    """What was found in a ``.beton``: ``seen`` of each image, and which of them are there more than once."""

    seen: Thumbnails
    repeated: Duplicates

    @property
    def data(self) -> Beton:
        return self.seen.data

    def damaged(self) -> tuple[str, ...]:
        """A sentence for each damaged image."""
        paths = self.data.manifest.paths
        return tuple(
            f"{self.data.path}: image {i} is damaged ({paths[i]}); pack the data again" for i in self.seen.damaged
        )

    def facts(self, image_size: int) -> Iterator[tuple[str, str]]:
        """Rows of a table."""
        data, classes = self.data, class_sizes(self.data)
        yield (
            "images",
            f"{data.num_images:,}, {len(self.seen.damaged) or 'none'} damaged, {len(self.seen.blank) or 'none'} blank",
        )
        exact = int(self.repeated.exact.sum())
        yield "there more than once", f"{exact:,} byte for byte, {len(self.repeated.rows) - exact:,} alike"
        for name, sides in (
            ("shorter side", shorter_sides(data)),
            ("longer side", np.maximum(data.widths, data.heights)),
        ):
            yield name, f"{sides.min()} to {sides.max()} px, median {np.median(sides):.0f}"
        yield f"below {image_size} px", f"{(shorter_sides(data) < image_size).sum():,} images"
        if classes:
            counts = list(classes.values())
            yield (
                "classes",
                f"{len(classes):,}, of {min(counts):,} to {max(counts):,} images, median {np.median(counts):,.0f}",
            )
        else:
            yield "classes", "no labels"

    def warnings(self, image_size: int) -> Iterator[str]:
        """A sentence for each thing that will do harm."""
        data, path, classes = self.data, self.data.path, class_sizes(self.data)
        blank, small = self.seen.blank, np.flatnonzero(shorter_sides(data) < image_size)
        if blank:
            yield f"{path}: {images(len(blank))} of one colour, which teach nothing: {self._named(blank)}"
        if 0 < len(small) <= data.num_images / 2:  # else it is what these images are like
            yield (
                f"{path}: {images(len(small))} with a side below {image_size} px, which crops of that size enlarge: "
                f"{self._named(small)}"
            )
        yield from _repeated(self, self, self.repeated)
        if len(classes) == 1:
            yield f"{path}: all images are of one class, {next(iter(classes))}: nothing can be measured on it"
        elif few := [name for name, count in classes.items() if count < FEW]:
            yield f"{path}: {len(few):,} of {len(classes):,} classes have fewer than {FEW} images: {some(few)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        data, paths = self.data, self.data.manifest.paths
        sides = shorter_sides(data)
        return {
            "path": str(data.path),
            "fingerprint": data.manifest.fingerprint,
            "images": data.num_images,
            "damaged": [{"row": i, "path": paths[i]} for i in self.seen.damaged],
            "blank": [{"row": i, "path": paths[i]} for i in self.seen.blank],
            "shorter_side": {"least": int(sides.min()), "median": float(np.median(sides)), "largest": int(sides.max())},
            "classes": dict(class_sizes(data)),
            "repeated": pairs_as_dicts(self, self, self.repeated),
        }

    def _named(self, rows: Collection[int] | np.ndarray) -> str:
        paths = self.data.manifest.paths
        return some([paths[i] for i in rows])


@dataclass(frozen=True)
class Leak:
    """The images of ``test`` that are in ``train``, too."""

    test: ImageCheck
    train: ImageCheck
    shared: Duplicates

    def warnings(self) -> Iterator[str]:
        yield from _repeated(self.test, self.train, self.shared)
        ours, theirs = class_sizes(self.test.data), class_sizes(self.train.data)
        pairs = (self.test, ours, self.train, theirs), (self.train, theirs, self.test, ours)
        for one, has, other, lacks in pairs:
            if has and lacks and (missing := [name for name in has if name not in lacks]):
                yield f"{one.data.path}: {len(missing):,} of {len(has):,} classes are not in {other.data.path}: {some(missing)}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shared = pairs_as_dicts(self.test, self.train, self.shared)
        return {"test": str(self.test.data.path), "train": str(self.train.data.path), "shared": shared}


def check_images(
    data: Beton, alike: Alike = ALIKE, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> ImageCheck:
    """Look at every image, and find those that are there more than once. 272 bytes of memory an image."""
    seen = thumbnails(data, workers, progress)
    return ImageCheck(seen, duplicates(seen, least=alike))


def check_leak(test: ImageCheck, train: ImageCheck, alike: Alike = ALIKE) -> Leak:
    """Find the images of ``test`` that are in ``train``, byte for byte or alike."""
    return Leak(test, train, duplicates(test.seen, train.seen, alike))


def shorter_sides(data: Beton) -> np.ndarray:
    """(N,) pixels."""
    return np.minimum(data.widths, data.heights)


def class_sizes(data: Beton) -> Counter[str]:
    """Images of each class that has any, by its name, in the order of labels; empty without labels."""
    if data.labels is None:
        return Counter()
    labels, counts = np.unique(data.labels, return_counts=True)
    sizes = zip(map(data.manifest.class_name, labels.tolist()), counts.tolist(), strict=True)
    return Counter({name: count for name, count in sizes if name is not None})


def _repeated(these: ImageCheck, others: ImageCheck, found: Duplicates) -> Iterator[str]:
    """Sentences of what is there twice byte for byte, and of what is alike."""
    within = these is others
    for exact, how in ((True, "byte for byte"), (False, "alike")):
        pairs = [(i, j) for i, j, same in zip(found.rows, found.of, found.exact, strict=True) if same == exact]
        if not pairs:
            continue
        names = [f"{these.data.manifest.paths[i]} ({others.data.manifest.paths[j]})" for i, j in pairs]
        differ = sum(_other_class(these, i, others, j) for i, j in pairs)
        there = f"are like an image of {others.data.path}" if not exact else f"are in {others.data.path}, too, {how}"
        if within:
            there = f"are there more than once, {how}" if exact else "are like an earlier one"
        yield (
            f"{these.data.path}: {len(pairs):,} of {these.data.num_images:,} images {there}"
            + (f", {differ:,} of them under another class" if differ else "")
            + f": {some(names)}"
        )


def _other_class(these: ImageCheck, row: int, others: ImageCheck, of: int) -> bool:
    """Whether both have a class, by name, and not the same."""
    one, other = (check.data.class_of(at) for check, at in ((these, row), (others, of)))
    return None not in (one, other) and one != other


def pairs_as_dicts(these: ImageCheck, others: ImageCheck, found: Duplicates) -> list[dict[str, Any]]:
    """For JSON: each repeated row with the row that it is like; ``alike`` is "exact" or the correlation of grey thumbnails."""
    return [
        {
            "row": i,
            "path": these.data.manifest.paths[i],
            "of_row": j,
            "of_path": others.data.manifest.paths[j],
            "alike": "exact" if alike > 1 else round(alike, 3),
        }
        for i, j, alike in zip(found.rows.tolist(), found.of.tolist(), found.alike.tolist(), strict=True)
    ]


def images(count: int) -> str:
    return f"{count:,} image{'s' if count != 1 else ''}"
