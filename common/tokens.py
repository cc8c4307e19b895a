"""A ViT's features out of its tokens, where they are not what the network itself pools."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MisuseError

LAST_BLOCKS = 4
"""Blocks of ``cls4``, as DINO's linear evaluation of its small ViTs and RoB's take them."""

TOKENS = {
    "cls": "the class token",
    "mean": "the mean of the patch tokens",
    "cls+mean": "both of them, twice as wide",
    "cls4": "the class tokens of the last four blocks, four times as wide",
}
"""What may be asked for. Tokens are those behind the last norm, of every block of ``cls4`` too; registers are left out."""


def is_dinov3(teacher: str) -> bool:
    """Whether it is one of DINOv3's ViTs, ours or timm's of that name: they give their class token, where timm's network would
    pool the mean."""
    return "dinov3" in teacher and "vit" in teacher


def check_tokens(backbone: nn.Module, features: str, name: str, setting: str = "features") -> None:
    """MisuseError where the network ``name`` has no such tokens: a CNN, a Swin, a ViT of fewer blocks."""
    model: Any = backbone
    # XCiT has a class token, but not in its blocks: timm then offers no such tokens of them.
    of_blocks = "return_prefix_tokens" in signature(getattr(model, "forward_intermediates", check_tokens)).parameters
    if getattr(model, "cls_token", None) is None or not of_blocks:
        raise MisuseError(f"`{setting}` {features} wants the class token of a ViT and {name} has none: leave it out")
    if features == "cls4" and len(model.blocks) < LAST_BLOCKS:
        raise MisuseError(
            f"`{setting}` cls4 wants a ViT of {LAST_BLOCKS} blocks or more and {name} has {len(model.blocks)}: leave it out"
        )


def token_features(backbone: nn.Module, images: Tensor, features: str) -> Tensor:
    """(N, D), (N, 2 D) for cls+mean or (N, 4 D) for cls4, of images (N, 3, H, W); a timm ViT that ``check_tokens`` lets pass."""
    model: Any = backbone
    if features == "cls4":
        blocks = model.forward_intermediates(
            images, LAST_BLOCKS, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.cat([prefix[:, 0] for _, prefix in blocks], 1)
    return of_tokens(backbone, model.forward_features(images), features)


def of_tokens(backbone: nn.Module, tokens: Tensor, features: str) -> Tensor:
    """The same of what ``forward_features`` gave; not cls4."""
    model: Any = backbone
    parts = {"cls": tokens[:, 0], "mean": tokens[:, model.num_prefix_tokens :].mean(1)}
    return torch.cat([parts[part] for part in features.split("+")], 1)


class TokenFeatures(nn.Module):
    """A ViT that gives ``token_features``. MisuseError as ``check_tokens``."""

    def __init__(self, backbone: nn.Module, features: str, name: str) -> None:
        super().__init__()
        check_tokens(backbone, features, name)
        self.backbone, self.features = backbone, features

    def forward(self, images: Tensor) -> Tensor:
        return token_features(self.backbone, images, self.features)
