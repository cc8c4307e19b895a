"""Segmentation by a linear probe of frozen patch features, as DINOv2's (2304.07193, 7.4): BatchNorm and a 1x1 convolution.

An image is seen whole, resized to a square of the network's size. Logits are interpolated to that square in training, and to the
image's own pixels in testing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ....common.errors import FailureError, MisuseError
from ....common.run import seed_everything
from ....common.tokens import TokenFeatures
from ...optimiser import cosine_decay
from ...students import pooled_and_map
from ..config import SegmentConfig
from ..network import FrozenNetwork
from .data import IGNORED, SegmentationData
from .layouts import open_segmentation
from .score import Confusion, SegmentationScore

IMAGES_AT_ONCE = 32

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SegmentProgress:
    """What a caller may show: images made to maps, steps of the probe, images tested, each as (done, total), and notes."""

    maps: Progress = lambda done, total: None
    steps: Progress = lambda done, total: None
    tested: Progress = lambda done, total: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class SegmentResult:
    """Of ``num_test`` images; the map has ``positions`` a side."""

    score: SegmentationScore
    positions: int
    num_train: int
    num_test: int

    def to_json(self) -> dict[str, Any]:
        sizes = {"positions": self.positions, "num_train": self.num_train, "num_test": self.num_test}
        return self.score.to_json() | sizes


def segment(network: FrozenNetwork, config: SegmentConfig, progress: SegmentProgress | None = None) -> SegmentResult:
    """Train the probe on ``config.train``, and score it on ``config.test``.

    MisuseError: data, or a network without a map. FailureError: an image that cannot be read, or a loss that is no number.
    """
    progress = progress or SegmentProgress()
    train = open_segmentation(config.train)
    test = open_segmentation(config.test)
    counts = train.counts()
    test = test.with_classes_of(train, counts)
    for sentence in (*train.left_out, *test.left_out):
        progress.note(sentence)
    maps = maps_of(network, train, config.layer, progress.maps)
    labels = torch.stack([square(train.labels(row), network.size) for row in range(len(train))])
    probe = fit(maps, labels, len(train.classes), config, network.device, progress.steps)
    found = maps_of(network, test, config.layer, progress.maps)
    return SegmentResult(
        score(probe, found, test, network.device, progress.tested), maps.shape[-1], len(train), len(test)
    )


@torch.no_grad()
def score(
    probe: nn.Module, maps: Tensor, data: SegmentationData, device: torch.device, progress: Progress = lambda *_: None
) -> SegmentationScore:
    """Of the ``probe`` on maps (N, C, h, w) of the images of ``data``, at these images' own pixels."""
    confusion = Confusion(len(data.classes))
    for row in range(len(data)):
        truth = torch.from_numpy(data.labels(row))
        logits = probe(maps[row : row + 1].to(device).float())
        confusion.add(_resized(logits, truth.shape).argmax(1)[0].cpu(), truth)
        progress(row + 1, len(data))
    return confusion.score(data.classes)


@torch.no_grad()
def maps_of(network: FrozenNetwork, data: SegmentationData, layer: int | None, progress: Progress) -> Tensor:
    """(N, C, h, w) float16 on the CPU. MisuseError: the network has no map."""
    embed = network.embed
    backbone = embed.backbone if isinstance(embed, TokenFeatures) else embed
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "forward_features"):
        raise MisuseError(
            f"{network.name} has no map of features to segment by: give a run, a student's weights, or a teacher"
        )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    filter_ = getattr(Image.Resampling, network.interpolation.upper())
    parts = []
    for start in range(0, len(data), IMAGES_AT_ONCE):
        rows = range(start, min(start + IMAGES_AT_ONCE, len(data)))
        pictures = [Image.fromarray(data.image(row)).resize((network.size, network.size), filter_) for row in rows]
        pixels = torch.stack([torch.from_numpy(np.array(picture)).movedim(2, 0) for picture in pictures])
        images = ((pixels / 255 - mean) / std).to(network.device)
        try:
            parts.append(pooled_and_map(backbone, images, layer)[1].half().cpu())
        except (AttributeError, AssertionError, IndexError, ValueError) as error:
            raise MisuseError(f"`layer` {layer}: {network.name} gives no map there ({error}): take another") from None
        progress(rows.stop, len(data))
    return torch.cat(parts)


def fit(
    maps: Tensor, labels: Tensor, classes: int, config: SegmentConfig, device: torch.device, progress: Progress
) -> nn.Module:
    """The probe, in eval mode, of maps (N, C, h, w) and labels (N, S, S) uint8."""
    seed_everything(config.seed)
    probe = nn.Sequential(nn.BatchNorm2d(maps.shape[1]), nn.Conv2d(maps.shape[1], classes, 1)).to(device)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    random = torch.Generator().manual_seed(config.seed)
    steps_per_epoch = -(-len(maps) // config.batch_size)
    total, step = config.epochs * steps_per_epoch, 0
    for _ in range(config.epochs):
        for rows in torch.randperm(len(maps), generator=random).split(config.batch_size):
            optimiser.param_groups[0]["lr"] = config.lr * cosine_decay(step, total)
            wanted = labels[rows].to(device).long()
            logits = _resized(probe(maps[rows].to(device).float()), wanted.shape[1:])
            counted = (wanted != IGNORED).sum().clamp(min=1)  # a batch may be ignored whole
            loss = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum") / counted
            if not loss.isfinite():
                raise FailureError(f"step {step + 1}: the loss is {loss.item():g}; lower `lr`")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            progress(step, total)
    return probe.eval()


def square(labels: np.ndarray, side: int) -> Tensor:
    """(H, W) uint8 to (side, side): the label at the middle of each."""
    rows, columns = ((np.arange(side) + 0.5) * length // side for length in labels.shape)
    return torch.from_numpy(labels[rows.astype(int)[:, None], columns.astype(int)[None]])


def _resized(logits: Tensor, shape: Any) -> Tensor:
    return F.interpolate(logits, size=tuple(shape), mode="bilinear", align_corners=False)
