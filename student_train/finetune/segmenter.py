"""A student with a light head that gives every pixel a class."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluate.detection.model import Pyramid


class Segmenter(nn.Module):
    """(N, 3, H, W) -> logits (N, C, H, W): the levels of torchvision's feature pyramid on the student's stages, resampled to the
    finest and added up, one convolution, a classifier of pixels (Panoptic FPN's semantic branch, 1901.02446, made light).
    """

    def __init__(self, backbone: nn.Module, num_classes: int, channels: int) -> None:
        super().__init__()
        self.body = Pyramid(backbone, channels)
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        finest, *others = list(self.body(images).values())[: self.body.num_pooled_from]
        size = finest.shape[-2:]
        joined = finest
        for level in others:
            joined = joined + F.interpolate(level, size=size, mode="bilinear", align_corners=False)
        return F.interpolate(self.head(joined), size=images.shape[-2:], mode="bilinear", align_corners=False)
