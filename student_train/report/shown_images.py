"""The images that a report shows, and what students and teachers make of them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...common.errors import FailureError, MisuseError
from ...common.images.beton import Beton
from ...common.store.reader import TargetStore
from ..evaluate.network import FrozenNetwork
from ..evaluate.yardstick import teacher_features
from .config import ReportConfig
from .run import Run


@dataclass(frozen=True)
class Images:
    """``ids`` of a packed set, spread over it; ``features`` are (n, D) of these by run, and, for images that a
    store has targets of, by teacher."""

    data: Beton
    ids: np.ndarray
    features: dict[str, Tensor]
    teachers: dict[str, Tensor]

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int, -1 where an image has none; None: no image has one."""
        labels = self.data.labels
        return None if labels is None else np.asarray(labels)[self.ids]

    def class_of(self, row: int) -> str:
        """Of the ``row``-th of these images; empty where it has none."""
        return self.data.class_of(int(self.ids[row])) or ""

    def path_of(self, row: int) -> str:
        return self.data.manifest.paths[self.ids[row]]


def open_images(path: Path, named: str | None, fingerprint: str | None) -> Beton:
    """MisuseError: with ``named``, the setting that gave the path, the file is missing, or has other images than the run's."""
    try:
        data = Beton(path)
    except (MisuseError, FailureError, OSError) as problem:
        if named is None:
            raise FileNotFoundError(str(problem)) from None
        raise
    if fingerprint is not None and data.manifest.fingerprint != fingerprint:
        said = f"{path} holds other images than the run was trained on"
        if named is None:
            raise FileNotFoundError(said)
        raise MisuseError(f"`{named}` {said}: give the file that it was trained on, or leave `{named}` out")
    return data


def look_at(
    data: Beton, runs: Sequence[Run], config: ReportConfig, device: torch.device, advance: Callable[[], None]
) -> Images:
    """Features by every run that has weights, and by every teacher whose store is of these images."""
    count = min(config.images, data.num_images)
    ids = np.unique(np.linspace(0, data.num_images - 1, count).astype(np.int64))
    features, teachers, weights = {}, {}, {}
    for run in runs:
        if run.has_weights:
            network = FrozenNetwork.student(run.folder, device)
            batches = network.centred(data, config.loader, ids)
            with torch.no_grad():
                rows = {
                    int(i): row
                    for some, x in batches
                    for i, row in zip(some, network.embed(x).float().cpu(), strict=True)
                }
            features[run.name] = torch.stack([rows[int(i)] for i in ids])
        for store in stores_of(run, data):
            name, its_weights = store.manifest.teacher, store.manifest.weights_hash
            if weights.setdefault(name, its_weights) != its_weights:
                name = f"{name} ({its_weights[:8]})"  # another one of this architecture
            if name not in teachers:
                teachers[name] = teacher_features(store, ids)
        advance()
    return Images(data, ids, features, teachers)


def stores_of(run: Run, data: Beton) -> list[TargetStore]:
    """The run's targets, where they are still there and are of these images."""
    told = run.settings.get("targets")
    stores = []
    for source in told if isinstance(told, list) else [told]:
        if isinstance(source, str) and Path(source).is_dir():
            with suppress(MisuseError, FailureError, OSError):
                store = TargetStore.open(Path(source))
                store.check_data(data.manifest)
                stores.append(store)
    return stores


def middle(data: Beton, image_id: int) -> np.ndarray:
    """The middle square of an image, (S, S, 3) uint8, much as students see it."""
    pixels = data.image(int(image_id))
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def examples(images: Images, count: int) -> list[int]:
    """Rows to show: one of each class by turns where there are classes, else spread over the images."""
    labels = images.labels
    if labels is None:
        return np.unique(np.linspace(0, len(images.ids) - 1, count).astype(int)).tolist()
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(by_class) > count:
        by_class = [by_class[at] for at in np.linspace(0, len(by_class) - 1, count).astype(int)]
    rows: list[int] = []
    for turn in range(count):
        for some in by_class:
            if len(rows) < count and turn < len(some):
                rows.append(int(some[(turn + len(some) // 2) % len(some)]))
    return rows
