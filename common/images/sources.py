"""Where images come from: a folder of files, or a named data set of torchvision. Read by ``rob pack``."""

import contextlib
import gzip
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import FailureError, MisuseError, unknown_name
from ..files import read_regular
from ..order import shuffled
from .reading import EXTENSIONS

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z", ".rar", ".zst")
LISTS = (".txt", ".csv", ".tsv", ".lst", ".list", ".json", ".jsonl")
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
"""Names of folders that are parts of a data set."""
ALL_PARTS = "all"
LARGEST = 1 << 32
"""Bytes of an image's file."""
MACHINES_OWN = ("@eaDir", "__MACOSX", "lost+found")
"""Folders that a NAS, an archiver and a file system leave among a user's."""
ODD_ONES = 0.05
"""At most this share of a folder's images lies beside its folders of classes by mistake."""
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the four files."""


@dataclass(frozen=True)
class Source:
    """Images in the order of their ids."""

    paths: tuple[str, ...]
    """Relative to the source, ``/``-separated, one an image."""
    read: Callable[[str], tuple[bytes | Image.Image, int]]
    """Path -> the file's bytes or a decoded image, and its label, -1 for none. Called from many threads."""
    classes: tuple[str, ...] | None
    left_out: tuple[str, ...] = ()
    """Sentences on files that were left out."""
    folder: Path | None = None
    """That the paths start from, where there is one."""

    def take(self, limit: int | None) -> "Source":
        """``limit`` images spread evenly over the sorted order, hence over the classes of a folder with sub-folders."""
        total = len(self.paths)
        if limit is None or limit >= total:
            return self
        return replace(self, paths=tuple(self.paths[row * total // limit] for row in range(limit)))

    def shuffled(self) -> "Source":
        """The same images in an order that has nothing to do with their names, and is always the same."""
        return replace(self, paths=tuple(self.paths[row] for row in shuffled(len(self.paths))))


def open_source(name: str, split: str = "train") -> Source:
    """The images of a folder, or else of the named data set's ``split``; a folder of that name comes first.

    Raises MisuseError for what is neither, for a folder without images and for an unknown split; FailureError when a
    named data set cannot be downloaded.
    """
    if not name:
        raise MisuseError("SOURCE is empty: give a folder of images, or . for the one you are in")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return open_folder(folder, whole=split == ALL_PARTS)
    if name in NAMED:
        return open_named(name, split)
    if (instead := what_instead(name, folder)) is not None:
        raise MisuseError(f"{name}: {instead}")
    if folder.exists():
        raise MisuseError(f"{folder}: a file, not a folder of images")
    if "/" in name or "." in name:
        raise MisuseError(f"{folder}: no such folder; SOURCE is a folder of images or one of {', '.join(NAMED)}")
    raise unknown_name("folder or named data set", name, NAMED)


def what_instead(name: str, path: Path) -> str | None:
    """What to do with a SOURCE that is no folder, by what it looks like; None: it looks like nothing in particular."""
    ending = path.suffix.lower()
    if "://" in name:
        return "an address; download it first, and give the folder that it is in"
    if any(sign in name for sign in "*?[") and not path.exists():
        return "a pattern; give the folder, of which every image is taken (`limit` takes fewer)"
    if not path.exists():
        return None
    if ending in ARCHIVES:
        return f"an archive; unpack it ({'unzip' if ending == '.zip' else 'tar xf'} {path.name}) and give the folder"
    if ending in EXTENSIONS:
        return f"a single image; give the folder that it is in, {path.parent}"
    if ending in LISTS:
        return (
            f"a list of images; make a folder of links to them (mkdir images && xargs -a {path.name} ln -s -t images), and give "
            "that"
        )
    return "packed already: give it to rob cache-teacher" if ending == ".beton" else None


def open_folder(folder: Path, whole: bool = True) -> Source:
    """All images below a folder, in sorted order of their relative paths; hidden files and folders are left out, and those that
    a machine made for itself.

    Labels exist when every image lies in a folder of its class: exactly one level below ``folder``. A few that lie beside these
    folders are left out. MisuseError, unless the folder is wanted ``whole``: its folders are named as the parts of a data set.
    """
    found = sorted(_walk(folder, "", (folder.resolve(),)))
    paths = tuple(path for path in found if path.lower().endswith(EXTENSIONS))
    if not paths:
        listed = "the folder is empty" if not any(folder.iterdir()) else "no image in it or below"
        raise MisuseError(f"{folder}: {listed}; looked for {' '.join(EXTENSIONS)}")
    parts = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if not whole and parts and all("/" in path for path in paths) and {part.lower() for part in parts} <= PARTS:
        raise MisuseError(
            f"{folder} has {', '.join(f'{part}/' for part in parts)}, which are parts of a data set and no classes: give one of "
            f"them as SOURCE ({folder / parts[0]}), or `split` {ALL_PARTS} for all their images in one file without classes"
        )
    left_out = _other_files(folder, [path for path in found if not path.lower().endswith(EXTENSIONS)])
    beside = [path for path in paths if "/" not in path]
    parents = {path.rpartition("/")[0] for path in paths} - {""}
    if beside and len(parents) > 1 and len(beside) <= max(1, ODD_ONES * len(paths)):
        paths = tuple(path for path in paths if "/" in path)
        left_out += (f"left out {_some(beside)}: beside the folders of classes in {folder}",)
    one_level = all(path.count("/") == 1 for path in paths) and not {p.lower() for p in parents} <= PARTS
    classes = tuple(sorted(parents)) if one_level else None
    labels = {name: index for index, name in enumerate(classes or ())}

    def read(path: str) -> tuple[bytes, int]:
        return read_regular(folder / path, LARGEST), labels.get(path.rpartition("/")[0], -1)

    return Source(paths, read, classes, left_out, folder)


def _other_files(folder: Path, paths: list[str]) -> tuple[str, ...]:
    """A sentence on what is no image, by its endings; none where there is nothing."""
    endings = Counter(Path(path).suffix.lower() or "without an ending" for path in paths)
    if not endings:
        return ()
    counted = ", ".join(f"{number:,} {ending}" for ending, number in endings.most_common(6))
    rest = sum(endings.values()) - sum(number for _, number in endings.most_common(6))
    more = f", {rest:,} others" if rest else ""
    return (f"left out of {folder}, as no images by their names: {counted}{more}",)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _walk(folder: Path, prefix: str, ancestors: tuple[Path, ...]) -> Iterator[str]:
    """Relative paths of the files below ``folder``. Follows links, except to a folder that it is in."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in MACHINES_OWN:
            continue
        if entry.is_dir():
            real = Path(entry.path).resolve()
            if real not in ancestors:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*ancestors, real))
        else:
            yield prefix + entry.name


_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}


def _splits(*names: str, **aliases: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names} | {alias: {"split": name} for alias, name in aliases.items()}


NAMED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _TRAIN_TEST),
    "cifar100": ("CIFAR100", _TRAIN_TEST),
    "country211": ("Country211", _splits("train", "test", val="valid")),
    "dtd": ("DTD", _splits("train", "val", "test")),
    "eurosat": ("EuroSAT", {"train": {}}),
    "fashion-mnist": ("FashionMNIST", _TRAIN_TEST),
    "fgvc-aircraft": ("FGVCAircraft", _splits("train", "val", "trainval", "test")),
    "food101": ("Food101", _splits("train", "test")),
    "gtsrb": ("GTSRB", _splits("train", "test")),
    "imagenette": ("Imagenette", _splits("train", "val")),
    "kmnist": ("KMNIST", _TRAIN_TEST),
    "mnist": ("MNIST", _TRAIN_TEST),
    "oxford-pets": ("OxfordIIITPet", _splits("test", train="trainval")),
    "stl10": ("STL10", _splits("train", "test", "unlabeled")),
}
"""Name on the command line -> class in ``torchvision.datasets``, and the arguments that select each split."""


def open_named(name: str, split: str) -> Source:
    """A split of a named data set, downloaded at first use to ``~/.cache/rob/NAME`` (or below ``$XDG_CACHE_HOME``).

    Image paths are made up: ``train/00017`` is item 17. Raises as ``open_source``.
    """
    if split not in NAMED[name][1]:
        raise unknown_name(f"split of {name}", split, NAMED[name][1])
    if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return _open_debian_fashion_mnist(split)

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rob" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):  # torchvision prints which mirror it tries
            return open_torchvision(name, split, folder, download=True)
    except (OSError, RuntimeError) as error:
        raise FailureError(
            f"could not download {name} to {folder} ({error}): check the network, or pack a folder of images instead"
        ) from error


def open_torchvision(name: str, split: str, folder: Path, download: bool) -> Source:
    """A split of a named data set that lies in ``folder`` as torchvision keeps it. Raises what torchvision raises."""
    from torchvision import datasets  # seconds to import, and folders need none of it

    class_name, splits = NAMED[name]
    dataset = getattr(datasets, class_name)(root=str(folder), download=download, **splits[split])
    # ImageNet-like data sets give each class as a tuple of synonyms.
    classes = [label if isinstance(label, str) else ", ".join(label) for label in getattr(dataset, "classes", ())]

    def read(path: str) -> tuple[Image.Image, int]:
        image, label = dataset[int(path.rpartition("/")[2])]
        return image, int(label)

    return Source(_item_paths(split, len(dataset)), read, tuple(classes) or None)


def _open_debian_fashion_mnist(split: str) -> Source:
    prefix = DEBIAN_FASHION_MNIST / ("train" if split == "train" else "t10k")
    images = _read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"))
    labels = _read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"))
    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

    def read(path: str) -> tuple[Image.Image, int]:
        item = int(path.rpartition("/")[2])
        return Image.fromarray(images[item]), int(labels[item])

    return Source(_item_paths(split, len(images)), read, classes)


def _item_paths(split: str, count: int) -> tuple[str, ...]:
    digits = len(str(count - 1))  # so that the sorted order is the data set's own
    return tuple(f"{split}/{item:0{digits}}" for item in range(count))


def _read_idx(path: Path) -> np.ndarray:
    """An array in the IDX form of MNIST: two zero bytes, type (8 = uint8), number of axes, big-endian shape, values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise FailureError(f"{path}: cannot be read ({error}); reinstall dataset-fashion-mnist") from error
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
