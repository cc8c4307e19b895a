"""The images to train on and the images to test on, with their features."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...common.views.loader import LoaderConfig
from .features import Features, labels_alone, same_classes
from .network import FrozenNetwork
from .subsets import hold_out

HELD_OUT = 0.2
"""Share of each class that is tested on where there is no test set; the same images for every network."""


@dataclass(frozen=True)
class LabelledImages:
    """Some images of the ``.beton`` at ``path``: row i of ``features`` is of image ``image_ids[i]``."""

    path: Path
    features: Features
    image_ids: Tensor
    num_stored: int
    """Images in the file."""

    def rows(self, indices: Tensor) -> "LabelledImages":
        return LabelledImages(self.path, self.features.rows(indices), self.image_ids[indices.cpu()], self.num_stored)

    def labels_by_id(self) -> Tensor:
        """(num_stored,) int64 on the CPU: the label of an image by its id, -1 where it is not among these."""
        labels = torch.full((self.num_stored,), -1)
        labels[self.image_ids] = self.features.labels.cpu()
        return labels


def labelled_images(
    network: FrozenNetwork,
    train: Path,
    test: Path | None,
    loader: LoaderConfig,
    keep_in: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """The images to train on and to test on, classes counted alike. Without ``test``, ``HELD_OUT`` of each class of
    ``train`` is the test set, chosen by a fixed seed.

    MisuseError: no labels, a class of the test set that the training set lacks, or a class of one image to hold out.
    """

    def read(path: Path) -> LabelledImages:
        features = network.features(path, loader, keep_in, progress)
        return LabelledImages(path, features, torch.arange(len(features)), len(features))

    labels = labels_alone(train)  # what they refuse is said before hours of extraction
    if test is None:
        kept, tested = hold_out(labels, HELD_OUT, 0, f"add some to {train}, or give `test`")
        stored = read(train)
        return stored.rows(kept), stored.rows(tested)
    same_classes(labels, labels_alone(test))
    stored, held_out = read(train), read(test)
    features = same_classes(stored.features, held_out.features)
    return stored, LabelledImages(held_out.path, features, held_out.image_ids, held_out.num_stored)
