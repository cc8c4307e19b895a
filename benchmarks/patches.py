"""How much of a teacher's patch tokens survives storing: bytes a view, cosine, and what a linear probe finds in what is left.

    python -m rob.benchmarks.patches --train masks/images/train --test masks/images/test

Each encoding is what ``rob cache-teacher --patches grid`` would store of a whole image, decoded again. The probe is that of ``rob
eval segment``, on the components as they are stored and on the tokens that they stand for: its BatchNorm scales each number by
itself, so that a turned basis changes what it finds. The teacher is the offline stand-in, a CNN, unless another is named: its
last feature map then stands for patch tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from rob.benchmarks.report import Report
from rob.common.config import Checkpoint
from rob.common.options import command
from rob.common.patches import BASIS, KEPT, MEAN, fit_pca, grid_rows
from rob.common.settings import Setting
from rob.common.store.codec import decode_patches, encode_patches
from rob.common.store.patches import PatchEncoding
from rob.student_train.evaluate.config import SegmentConfig
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.evaluate.segmentation.layouts import open_segmentation
from rob.student_train.evaluate.segmentation.linear import fit, maps_of, score, square
from rob.teacher_cache.config import TeacherConfig
from rob.teacher_cache.teachers import load_teacher

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PatchesBench:
    """Of which images, masks and teacher."""

    train: Annotated[Path, Setting("Images with masks to fit the PCA and the probe on, as for rob eval segment.")]
    test: Annotated[Path, Setting("Images with masks to test on.")]
    teacher: Annotated[str, Setting("As for rob cache-teacher.")] = "efficientnet_lite0"
    checkpoint: Checkpoint = None
    size: Annotated[int, Setting("Side in pixels of the teacher's views.", low=32)] = 224
    epochs: Annotated[int, Setting("Of the probe.", low=1)] = 40


class Probe:
    """The linear probe of ``rob eval segment`` on what is left of the same images' maps."""

    def __init__(self, config: PatchesBench) -> None:
        train, test = open_segmentation(config.train), open_segmentation(config.test)
        self.train, self.test = train, test.with_classes_of(train, train.counts())
        self.labels = torch.stack([square(train.labels(row), config.size) for row in range(len(train))])
        self.config = SegmentConfig(config.train, config.test, epochs=config.epochs)

    def maps(self, network: FrozenNetwork) -> list[Tensor]:
        """Of the images to train on and of those to test on, each (N, C, h, w) float32."""
        return [maps_of(network, data, None, lambda done, total: None).float() for data in (self.train, self.test)]

    def miou(self, maps: Sequence[Tensor]) -> float:
        """In percent, fitted on the first and scored on the second."""
        found = fit(maps[0], self.labels, len(self.train.classes), self.config, CPU, lambda done, total: None)
        return score(found, maps[1], self.test, CPU).miou


def run(config: PatchesBench) -> Report:
    teacher = load_teacher(TeacherConfig(config.teacher, config.checkpoint))
    probe = Probe(config)
    maps = probe.maps(FrozenNetwork.teacher(teacher, config.size, CPU))
    rows: list[dict[str, Any]] = []
    for name, bytes_, kept, stored in encodings(*maps):
        whole = torch.nn.functional.adaptive_avg_pool2d(maps[1], stored[1].shape[-1])
        row = {"encoding": name, "bytes_per_view": bytes_}
        row["cosine"] = torch.cosine_similarity(kept[1], whole, dim=1).mean().item()
        row["miou"] = probe.miou(stored)
        if kept[0].shape[1] != stored[0].shape[1]:
            row["miou_of_tokens"] = probe.miou(kept)
        rows.append(row)
    return Report.of("patches", CPU, work(config, probe), rows, {})


def work(config: PatchesBench, probe: Probe) -> dict[str, Any]:
    """What every row of a report has in common."""
    sizes = {"train": len(probe.train), "test": len(probe.test)}
    return {"teacher": config.teacher, "size": config.size, **sizes, "epochs": config.epochs}


def encodings(train: Tensor, test: Tensor) -> Iterator[tuple[str, int, list[Tensor], list[Tensor]]]:
    """Name, bytes a view, the tokens (N, C, g, g) of both sets as they come back, and what is decoded: their components."""
    width, side = train.shape[1:3]
    yield "float32, all", 4 * width * side * side, [train, test], [train, test]
    grids = sorted({side, max(1, side // 2)}, reverse=True)
    for grid in grids:
        for dim in [width, *(d for d in (256, 128, 64, 32, 16) if d < width)]:
            encoding = PatchEncoding("grid", grid, dim, width)
            pca = fit_pca([grid_rows(train, grid).flatten(0, 1)], dim) if encoding.reduced else None
            basis, mean = (
                (torch.eye(width), torch.zeros(width))
                if pca is None
                else map(torch.from_numpy, (pca[BASIS], pca[MEAN]))
            )
            stored = []
            for maps in (train, test):
                arrays = encode_patches(encoding, (grid_rows(maps, grid) - mean) @ basis.T)
                stored.append(decode_patches(encoding, arrays)["embedding"])
            back = [values @ basis + mean for values in stored]
            tokens, shown = ([values.mT.unflatten(2, (grid, grid)) for values in both] for both in (back, stored))
            kept = "" if pca is None else f", {float(pca[KEPT]):.0%} of the variance"
            yield f"{grid} x {grid} x {dim}, int8{kept}", encoding.bytes_per_view, tokens, shown


if __name__ == "__main__":

    def patches(config: PatchesBench, out: Annotated[Path | None, Setting("JSON to write.")] = None) -> None:
        """Bytes, cosine and mean IoU of every encoding of patch tokens."""
        report = run(config)
        report.show()
        report.write(out)

    typer.run(command(patches))
