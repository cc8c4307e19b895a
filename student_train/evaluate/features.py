"""Frozen features of a data set: extracted once, kept on disk, shared by every evaluation."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ...common.errors import FailureError, MisuseError
from ...common.files import replacing
from ...common.images.beton import Beton
from ...common.records import DamagedError
from ...common.run import free_memory
from ...common.weights import read_tensor_file, tensor_file

COPIES = 4
"""Of the features, that an evaluation holds at most: rows to train on, rows to choose by, both standardised."""
SHARD_ROWS = 16_384
"""Images whose features are written at a time: 32 MB of 512 dimensions, and no more lost when extraction is killed."""


@dataclass(frozen=True)
class Features:
    """Row i is image i: ``features`` (N, D) float32 and ``labels`` (N,) int64, on one device; class names if known."""

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_classes(self) -> int:
        """Columns that a classifier needs: the class names, or one more than the greatest label."""
        return len(self.classes) if self.classes else int(self.labels.max()) + 1

    def class_name(self, label: int) -> str:
        """A label as a sentence names it: the class in quotes, or the number where classes have no names."""
        return repr(self.classes[label]) if self.classes and label < len(self.classes) else str(label)

    def rows(self, indices: Tensor | np.ndarray) -> "Features":
        """The chosen rows, in the order given."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return Features(self.features[chosen], self.labels[chosen], self.classes)

    def to(self, device: torch.device | str) -> "Features":
        return Features(self.features.to(device), self.labels.to(device), self.classes)


def brought_to(device: torch.device, train: Features, test: Features) -> tuple[Features, Features]:
    """Both where they are evaluated: on ``device``, or where they are if that is a GPU without room for ``COPIES`` of them."""
    room = free_memory(device) if device.type == "cuda" else None
    if room is not None and COPIES * train.features.nbytes + test.features.nbytes > room:
        return train, test
    return train.to(device), test.to(device)


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on: features are read back only where all of it is the same.

    ``source`` is ``hash_weights(backbone.state_dict())``, a teacher's weight hash, or ``"pixels"``; ``features`` are those of
    ``common.tokens`` where they are not what the network pools itself, ``geometry`` how images were resized.
    """

    source: str
    data_fingerprint: str
    image_size: int
    features: str | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    geometry: str = "planes"

    def to_dict(self) -> dict[str, Any]:
        """What is usual is left out: features that are older than the choice are found where they are."""
        usual = (
            ("features", None),
            ("interpolation", "bilinear"),
            ("mean", IMAGENET_DEFAULT_MEAN),
            ("std", IMAGENET_DEFAULT_STD),
            ("geometry", "planes"),
        )
        return {name: value for name, value in asdict(self).items() if (name, value) not in usual}

    def folder(self, run_folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        return run_folder / "eval" / "features" / digest[:16]


@torch.no_grad()
def extract_features(
    backbone: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    start: int,
    stop: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Features (stop - start, D), float32 on the CPU, of image ids start ... stop - 1 whatever the order of arrival.

    ``batches`` yields image ids (B,) int64 and normalised images (B, 3, S, S) on the backbone's device. A backbone that is
    a module runs in eval mode and is left in the mode it had. ``progress`` is called with the number of images of each
    batch. FailureError: the batches did not cover every image.
    """
    order, outputs, fetched = [], [], []
    waiting = 0
    seen = torch.zeros(stop - start, dtype=torch.bool)
    training = isinstance(backbone, nn.Module) and backbone.training
    if isinstance(backbone, nn.Module):
        backbone.eval()
    try:
        for image_ids, images in batches:
            outputs.append(backbone(images).float())
            order.append(rows := image_ids.cpu() - start)
            waiting += outputs[-1].nbytes
            if waiting >= bytes_to_fetch(outputs[-1].device):
                fetched.append(torch.cat(outputs).cpu())
                outputs, waiting = [], 0
            seen[rows] = True
            if progress:
                progress(len(rows))
    finally:
        if isinstance(backbone, nn.Module):
            backbone.train(training)
    if not seen.all():
        raise FailureError(f"the loader gave {int(seen.sum())} of {stop - start} images")
    if outputs:
        fetched.append(torch.cat(outputs).cpu())
    ids = torch.cat(order)
    if len(ids) == stop - start and torch.equal(ids, torch.arange(stop - start)):
        return torch.cat(fetched)
    features = fetched[0].new_empty(stop - start, fetched[0].shape[1])
    features[ids] = torch.cat(fetched)
    return features


def bytes_to_fetch(device: torch.device) -> int:
    """Of features that a GPU is asked for at once: to fetch a batch is to wait for it, with nothing for the GPU to do until the
    next."""
    return 1 if device.type == "cpu" else 1 << 28


def cached_features(
    run_folder: Path, key: FeatureKey, num_images: int, extract: Callable[[int, int], Tensor]
) -> Tensor:
    """The features (num_images, D) kept in ``run_folder/eval`` under ``key``; what is missing comes from ``extract``.

    ``extract(start, stop)`` gives the features of those rows. They are written a shard at a time, so a killed extraction
    goes on from the last whole one. Labels are not kept: packing the same images again may change them. A damaged shard
    is replaced. FailureError: a shard cannot be written.
    """
    shards = []
    for start in range(0, num_images, SHARD_ROWS):
        path, stop = key.folder(run_folder) / f"{start:09}.safetensors", min(start + SHARD_ROWS, num_images)
        metadata = {"key": json.dumps(key.to_dict())}
        try:
            shards.append(_kept(path, metadata, stop - start))
        except (OSError, DamagedError):
            shards.append(extract(start, stop).contiguous())
            with replacing(path) as file:
                file.write(tensor_file({"features": shards[-1]}, metadata))
    return torch.cat(shards)


def _kept(path: Path, metadata: dict[str, str], rows: int) -> Tensor:
    tensors, told = read_tensor_file(path)
    features = tensors.get("features")
    if told != metadata or features is None or features.dtype != torch.float32 or features.shape[:-1] != (rows,):
        raise DamagedError("has other features")
    return features


def flatten_pixels(images: Tensor) -> Tensor:
    """The backbone that learned nothing: ``(B, 3, S, S) -> (B, 3 * S * S)``, the floor of every evaluation."""
    return images.flatten(1)


def labels_of(data: Beton) -> Tensor:
    """(N,) int64: the class of each image. MisuseError: an image has none."""
    if data.labels is None:
        raise MisuseError(f"{data.named} has no labels: pack a folder with one sub-folder a class")
    labels = torch.as_tensor(data.labels, dtype=torch.int64)
    missing = torch.nonzero(labels < 0).flatten().tolist()
    if missing:
        raise MisuseError(
            f"{data.named}: {len(missing)} of {len(labels)} images have no label, the first is "
            f"{data.manifest.paths[missing[0]]}: give them one where they lie, or leave them out, and pack again"
        )
    return labels


def labels_alone(path: Path) -> Features:
    """Labels and class names of packed images, with features of no width. MisuseError: an image has no label."""
    data = Beton(path)
    return Features(torch.zeros(data.num_images, 0), labels_of(data), data.manifest.classes)


def same_classes(train: Features, test: Features) -> Features:
    """``test`` with its labels counted as ``train``'s: by class name where both have names, else by number.

    A test folder that lacks a class of the training folder numbers the others differently; by name they meet again.
    MisuseError: a class of the test set that the training set lacks, or features of another width.
    """
    if train.features.shape[1] != test.features.shape[1]:
        raise MisuseError(
            f"features of {train.features.shape[1]} dimensions cannot be tested on {test.features.shape[1]}: "
            "extract both with the same network at the same size"
        )
    labels = test.labels
    if train.classes and test.classes:
        number = {name: index for index, name in enumerate(train.classes)}
        used = labels.unique().tolist()
        unknown = [test.classes[index] for index in used if test.classes[index] not in number]
        if unknown:
            raise MisuseError(f"class {unknown[0]!r} of the test set is not in the training set")
        renumbered = torch.tensor([number.get(name, -1) for name in test.classes], device=labels.device)
        labels = renumbered[labels]
    absent = labels[~torch.isin(labels, train.labels.unique())]
    if len(absent):
        raise MisuseError(f"class {train.class_name(int(absent[0]))} of the test set has no image in the training set")
    return Features(test.features, labels, train.classes)
