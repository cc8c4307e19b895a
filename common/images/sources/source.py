"""What ``rob pack`` takes images from, whatever it is: their names in an order, and a function that reads the image of a name."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ...order import shuffled
from ...places import is_address

LARGEST = 1 << 32
"""Bytes of an image's file."""
MOST_NUMBER = 1 << 16
"""Labels that are whole numbers below it are kept as they are; others are names."""


@dataclass(frozen=True)
class Source:
    """Images in the order of their ids. A new kind of source is one file of this package that gives one of these."""

    paths: tuple[str, ...]
    """Relative to the source, ``/``-separated, one an image."""
    read: Callable[[str], tuple[bytes | Image.Image, int]]
    """Path -> the file's bytes or a decoded image, and its label, -1 for none. Called from many threads. OSError or BadImage:
    that one image cannot be read."""
    classes: tuple[str, ...] | None
    left_out: tuple[str, ...] = ()
    """Sentences on files that were left out."""
    folder: Path | None = None
    """That the paths start from, where there is one."""
    where: str = ""
    """The same, or an address, as a user writes it."""
    stamp: str = ""
    """Of the files that images and labels come out of: another one after they were changed."""
    at_once: int = 1
    """Images that are worth reading side by side, however few the cores: those of a bucket take long to come."""

    def at(self, path: str) -> str:
        """Where an image is, for an error."""
        return path if is_address(path) else os.path.join(self.where, path)

    def take(self, limit: int | None) -> "Source":
        """``limit`` images spread evenly over the sorted order, hence over the classes of a folder with sub-folders."""
        total = len(self.paths)
        if limit is None or limit >= total:
            return self
        return replace(self, paths=tuple(self.paths[row * total // limit] for row in range(limit)))

    def shuffled(self) -> "Source":
        """The same images in an order that has nothing to do with their names, and is always the same."""
        return replace(self, paths=tuple(self.paths[row] for row in shuffled(len(self.paths))))


def numbered(labels: Sequence[str | int | None]) -> tuple[list[int], tuple[str, ...] | None]:
    """Labels as a list, a table or a tar has them -> numbers, -1 for none, and the names of the classes where they are names.

    Whole numbers stay what they are, so that two lists of one data set agree; names are numbered in sorted order.
    """
    words = ["" if label is None else str(label).strip() for label in labels]
    known = {word: _number(word) for word in set(words)}
    if all(number is not None for number in known.values()):
        return [known[word] or 0 for word in words], None
    classes = tuple(sorted(set(words) - {""}))
    places = {name: place for place, name in enumerate(classes)} | {"": -1}
    return [places[word] for word in words], classes


def _number(word: str) -> int | None:
    """-1: there is none. None: it is a name."""
    if word in ("", "-1"):
        return -1
    return int(word) if word.isascii() and word.isdigit() and int(word) < MOST_NUMBER else None


def item_names(prefix: str, count: int) -> Iterable[str]:
    """``train/00017`` is item 17: made-up names, whose sorted order is that of the items."""
    digits = len(str(count - 1))
    return (f"{prefix}/{item:0{digits}}" for item in range(count))
