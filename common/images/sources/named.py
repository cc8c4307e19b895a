"""Named data sets as sources: torchvision's, and Debian's Fashion-MNIST."""

import contextlib
import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import FailureError, unknown_name
from ...files import cache_folder
from .source import Source, item_names

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the four files."""

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

    folder = cache_folder() / name
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

    return Source(tuple(item_names(split, len(dataset))), read, tuple(classes) or None, where=name)


def _open_debian_fashion_mnist(split: str) -> Source:
    prefix = DEBIAN_FASHION_MNIST / ("train" if split == "train" else "t10k")
    images = _read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"))
    labels = _read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"))
    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

    def read(path: str) -> tuple[Image.Image, int]:
        item = int(path.rpartition("/")[2])
        return Image.fromarray(images[item]), int(labels[item])

    return Source(tuple(item_names(split, len(images))), read, classes, where="fashion-mnist")


def _read_idx(path: Path) -> np.ndarray:
    """An array in the IDX form of MNIST: two zero bytes, type (8 = uint8), number of axes, big-endian shape, values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise FailureError(f"{path}: cannot be read ({error}); reinstall dataset-fashion-mnist") from error
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
