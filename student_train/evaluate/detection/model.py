"""A student as the backbone of torchvision's Faster or Mask R-CNN, through a feature pyramid."""

import math
from collections import OrderedDict

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from ....common.errors import MisuseError, first_line
from ....common.own_network import OwnNetwork
from ...students import StudentInfo

FINEST, COARSEST = 4, 64
"""Strides of a pyramid's levels in pixels: from one to the other by doubling, as in FPN; a student whose stages are
finer or coarser gives what it has, and levels of maximum pooling follow it up to the coarsest.
"""
PROBE = 224
"""Pixels: a multiple of the usual patches (4, 7, 8, 14, 16, 32)."""
ANCHOR_STRIDES = 8
"""Side of a level's anchors in units of its stride: 32 px at stride 4, as in FPN."""


def build_detector(
    backbone: nn.Module, info: StudentInfo, num_classes: int, *, masks: bool, side: int, channels: int = 256
) -> FasterRCNN:
    """Faster R-CNN, or Mask R-CNN with ``masks``, for ``num_classes`` classes and the background.

    Images are scaled to a shorter ``side`` (at most 5/3 of it the longer, as 800 and 1333) and normalised as ``info``
    says. ``channels`` of the pyramid and its heads: 256 as published, fewer for CPUs. All layers are trained, batch norm
    with its own statistics, whatever the backbone was initialised with. MisuseError: a student that has no stages or
    cannot take such images.
    """
    body = Pyramid(backbone, channels)
    strides = body.strides
    names = [str(level) for level in range(body.num_pooled_from)]
    settings = {
        "min_size": side,
        "max_size": side * 5 // 3,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
        "size_divisible": body.size_divisible,
        "rpn_anchor_generator": AnchorGenerator(
            tuple((ANCHOR_STRIDES * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
    }
    if not masks:
        return FasterRCNN(body, num_classes + 1, **settings)
    pool = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    detector = MaskRCNN(body, num_classes + 1, mask_roi_pool=pool, **settings)
    detector.roi_heads.mask_head = MaskRCNNHeads(channels, (channels,) * 4, dilation=1)
    detector.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes + 1)
    return detector


class Pyramid(nn.Module):
    """(N, 3, H, W) -> levels "0", "1" ... (N, channels, H / stride, W / stride).

    A CNN's stages go through a feature pyramid network (Lin et al. 2017); the one map of a ViT is resampled to the same
    strides (ViTDet's simple pyramid, Li et al. 2022).
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        if not hasattr(backbone, "forward_intermediates"):
            whose = backbone.whose if isinstance(backbone, OwnNetwork) else f"student {type(backbone).__name__}"
            raise MisuseError(
                f"{whose} does not show its stages, as timm's do, so there is no pyramid on it: load its student.safetensors "
                "into the detector or segmenter that it is of (docs/own.md)"
            )
        self.backbone, self.out_channels = backbone, channels
        maps = self._probe()
        strides = [PROBE / stage.shape[-2] for stage in maps]
        self.is_cnn = len(set(strides)) > 1
        if self.is_cnn:
            last = {stride: index for index, stride in enumerate(strides)}  # the deepest map of each stride
            fine_enough = [stride for stride in sorted(last) if stride >= FINEST] or [max(last)]
            self.indices = [last[stride] for stride in fine_enough]
            self.strides = [round(stride) for stride in fine_enough]
            self.neck = FeaturePyramidNetwork([maps[index].shape[1] for index in self.indices], channels)
            self.size_divisible = max(32, self.strides[-1])
        else:
            patch = round(strides[-1])
            finest = max(0, round(math.log2(patch / FINEST)))  # doublings from the patches to the finest level
            self.levels = range(finest, finest - 4, -1)
            self.strides = [round(patch / 2.0**level) for level in self.levels]
            self.neck = nn.ModuleList(_resample(maps[-1].shape[1], channels, level) for level in self.levels)
            self.size_divisible = math.lcm(32, 2 * patch)
        self.num_pooled_from = len(self.strides)
        while self.strides[-1] < COARSEST:
            self.strides.append(2 * self.strides[-1])

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if self.is_cnn:
            maps = self.backbone.forward_intermediates(images, intermediates_only=True)  # pyright: ignore
            levels = list(self.neck(OrderedDict((str(i), maps[i]) for i in self.indices)).values())
        else:
            (last,) = self.backbone.forward_intermediates(  # pyright: ignore
                images, indices=1, norm=True, intermediates_only=True
            )
            levels = [resample(last) for resample in self.neck]  # pyright: ignore
        while len(levels) < len(self.strides):
            levels.append(nn.functional.max_pool2d(levels[-1], 1, stride=2))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))

    @torch.no_grad()
    def _probe(self) -> list[Tensor]:
        """The backbone's maps of a black image of ``PROBE`` by twice as many pixels, which no network of one size takes."""
        training = self.backbone.training
        try:
            image = torch.zeros(1, 3, PROBE, 2 * PROBE)
            return self.backbone.eval().forward_intermediates(image, intermediates_only=True)  # pyright: ignore
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = first_line(error).rstrip(".")
            raise MisuseError(
                f"the student cannot take images of other sizes than it was made for: {reason}"
            ) from error
        finally:
            self.backbone.train(training)


def _resample(in_channels: int, channels: int, level: int) -> nn.Module:
    """From a ViT's map to one 2^level times as fine."""
    layers: list[nn.Module] = []
    width = in_channels
    for step in range(level):
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width //= 2
        if step < level - 1:
            layers += [LayerNorm2d(width), nn.GELU()]
    if level < 0:
        layers.append(nn.MaxPool2d(kernel_size=2**-level, stride=2**-level))
    layers += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers)
