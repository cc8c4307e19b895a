"""Teachers' files in their published layouts with random weights, and what the official networks compute from them.

Tiny widths for each entry of the registry, the true widths for one of each kind.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rob.teacher_cache.teachers import Teacher, TeacherConfig, load_teacher
from support import official
from support.official import Weights

Backbone = Callable[[Weights, Tensor], Tensor]
Head = Callable[[Weights, Tensor], tuple[Tensor, Tensor | None]]
Wrap = Callable[[Weights, Weights, Weights], dict[str, Any]]


@dataclass(frozen=True)
class Fixture:
    """An official teacher: what it computes, and how its file looks."""

    backbone: Backbone
    head: Head
    wrap: Wrap
    """From the weights of the backbone and of the head, and another encoder's: what the file holds."""
    arguments: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    contrast: float = 1.0
    """Standard deviation of the images: where it is small, the epsilons of LayerNorms show."""

    def official(self, images: Tensor) -> tuple[Weights, Weights, Tensor, Tensor | None]:
        """The backbone's and the head's weights, always the same ones, and what they make of images: embeddings, logits."""
        backbone, head = Weights(1), Weights(2)
        embedding, logits = self.head(head, self.backbone(backbone, images))
        return backbone, head, embedding, logits

    def build(self, path: Path, batch: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
        """Writes the file; images, and the embeddings and logits that the official code has for them."""
        images = torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(5))
        images *= self.contrast
        backbone, head, embedding, logits = self.official(images)
        other = Weights()
        other.update({name: tensor + 1 for name, tensor in backbone.items()})
        torch.save(self.wrap(backbone, head, other), path)
        return images, embedding, logits


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def dino_head(w: Weights, x: Tensor, hidden: int = 24, dim: int = 16, num: int = 40, patches: bool = False):
    """dino's DINOHead: three layers with GELU, then a weight-normed layer whose gain was trained."""
    for layer in ("mlp.0", "mlp.2"):
        x = F.gelu(w.linear(x, layer, hidden))
    x = F.normalize(w.linear(x, "mlp.4", dim), dim=1)
    for layer in ("last_layer2", "last_layer") if patches else ("last_layer",):
        gain, direction = 1 + w(f"{layer}.weight_g", num, 1).abs(), w(f"{layer}.weight_v", num, dim)
        w[f"{layer}.weight_g"] = gain
    return x, x @ (gain * direction / direction.norm(dim=1, keepdim=True)).T


def dino_resnet_head(w: Weights, x: Tensor, hidden: int = 24, dim: int = 16, num: int = 40):
    """The head of dino's ResNet-50: two layers with BatchNorm, then a plain layer."""
    x = F.gelu(w.batch_norm(w.linear(x, "mlp.0", hidden), "mlp.1"))
    x = F.normalize(w.linear(x, "mlp.3", dim), dim=1)
    return x, w.linear(x, "last_layer", num, bias=False)


def swav_head(w: Weights, x: Tensor, hidden: int = 24, dim: int = 16, num: int = 40, sets: int = 0):
    """swav's head, and its prototypes after ``normalize_prototypes``; deepcluster-v2 has several ``sets`` of them."""
    x = w.batch_norm(w.linear(x, "projection_head.0", hidden), "projection_head.1").relu()
    x = F.normalize(w.linear(x, "projection_head.3", dim), dim=1)
    for index in reversed(range(sets)):
        rows = w(f"prototypes.prototypes{index}.weight", num, dim)
    if not sets:
        rows = w("prototypes.weight", num, dim)
    return x, x @ F.normalize(rows, dim=1).T


def msn_head(w: Weights, x: Tensor, hidden: int = 24, dim: int = 16, num: int = 40):
    """msn's head and the cosines of its loss."""
    for index in (1, 2):
        x = F.gelu(w.batch_norm(w.linear(x, f"fc.fc{index}", hidden), f"fc.bn{index}"))
    x = F.normalize(w.linear(x, "fc.fc3", dim), dim=1)
    return x, x @ F.normalize(w("prototypes", num, dim), dim=1).T


def moco_v2_head(w: Weights, x: Tensor, hidden: int = 24, dim: int = 16):
    return F.normalize(w.linear(w.linear(x, "fc.0", hidden).relu(), "fc.2", dim), dim=1), None


def moco_v3_head(w: Weights, x: Tensor, hidden: int = 24, dim: int = 16):
    """moco-v3's projector: layers without biases, and a BatchNorm without affine part at the end."""
    for index in (0, 3):
        x = w.batch_norm(w.linear(x, f"head.{index}", hidden, bias=False), f"head.{index + 1}").relu()
    return F.normalize(w.batch_norm(w.linear(x, "head.6", dim, bias=False), "head.7", affine=False), dim=1), None


def no_head(w: Weights, x: Tensor):
    return F.normalize(x, dim=1), None


def wrap_dino(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    teacher = prefixed("backbone.", backbone) | prefixed("head.", head)
    student = prefixed("module.backbone.", other)
    return {"student": student, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(arch="vit_small", lr=5e-4)}


def wrap_ibot(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    centre = torch.arange(40.0) / 40
    return wrap_dino(backbone, head, other) | {"ibot_loss": {"center": centre[None], "center2": -centre[None, None]}}


def wrap_swav(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    return prefixed("module.", backbone) | prefixed("module.", head)


def wrap_msn(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    head = dict(head)
    prototypes = head.pop("prototypes")
    return {"target_encoder": prefixed("module.", backbone) | prefixed("module.", head), "prototypes": prototypes}


def wrap_moco_v2(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    query = prefixed("module.encoder_q.", backbone) | prefixed("module.encoder_q.", head)
    key = prefixed("module.encoder_k.", other) | prefixed("module.encoder_k.", head)
    queue = {"module.queue": torch.zeros(16, 8), "module.queue_ptr": torch.zeros(1)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet50", "state_dict": key | query | queue, "optimizer": optimizer}


def wrap_moco_v3(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    momentum = prefixed("module.momentum_encoder.", other) | prefixed("module.momentum_encoder.", head)
    base = prefixed("module.base_encoder.", backbone) | prefixed("module.base_encoder.", head)
    return {"epoch": 300, "state_dict": base | momentum | {"module.predictor.0.weight": torch.zeros(4, 4)}}


def wrap_bare(backbone: Weights, head: Weights, other: Weights) -> dict[str, Any]:
    return dict(backbone) | {"mask_token": torch.zeros(1, 48)}


SMALL_VIT = {"embed_dim": 48, "depth": 2}  # the heads stay those of the entry: 6, 12 or 16
SMALL_RESNET = {"layers": (1, 2, 1, 1), "channels": (8, 16, 32, 64)}


def vit(heads: int, patch: int, head: Head, wrap: Wrap, size: int = 32, **arguments: Any) -> Fixture:
    """``arguments`` are for timm, which must not be told the heads or the patch: these the entry has to know."""
    backbone = partial(official.vit, dim=48, depth=2, heads=heads, patch=patch, layer_scale=head is no_head)
    return Fixture(backbone, head, wrap, {**SMALL_VIT, "img_size": size, **arguments}, size)


def resnet(head: Head, wrap: Wrap, padded: bool = False) -> Fixture:
    backbone = partial(official.resnet, layers=SMALL_RESNET["layers"], width=8, padded=padded)
    return Fixture(backbone, head, wrap, SMALL_RESNET, size=64)


def wide_resnet(width: int) -> Fixture:
    backbone = partial(official.resnet, layers=(1, 2, 1, 1), width=4 * width, stem=4 * width, padded=True)
    return Fixture(backbone, swav_head, wrap_swav, {"channels": 4, "layers": (1, 2, 1, 1)}, size=64)


def swin(window: int) -> Fixture:
    backbone = partial(official.swin, dim=12, depths=(2, 2), heads=(3, 6), window=window)
    arguments = {"embed_dim": 12, "depths": (2, 2), "num_heads": (3, 6), "img_size": 8 * window}
    return Fixture(backbone, partial(dino_head, patches=True), wrap_ibot, arguments, size=8 * window, contrast=0.02)


def xcit(patch: int, depth: int) -> Fixture:
    backbone = partial(official.xcit, dim=48, depth=depth, heads=8, patch=patch)
    return Fixture(backbone, dino_head, wrap_dino, {"embed_dim": 48, "depth": depth}, size=48)


ibot_head = partial(dino_head, patches=True)
TINY: dict[str, Fixture] = {
    "dino_vits16": vit(6, 16, dino_head, wrap_dino),
    "dino_vits8": vit(6, 8, dino_head, wrap_dino),
    "dino_vitb16": vit(12, 16, dino_head, wrap_dino),
    "dino_vitb8": vit(12, 8, dino_head, wrap_dino),
    "dino_resnet50": resnet(dino_resnet_head, wrap_dino),
    "dino_xcit_small_12_p16": xcit(16, depth=2),
    "dino_xcit_small_12_p8": xcit(8, depth=2),
    "dino_xcit_medium_24_p16": xcit(16, depth=3),
    "dino_xcit_medium_24_p8": xcit(8, depth=3),
    "ibot_vits16": vit(6, 16, ibot_head, wrap_ibot),
    "ibot_vitb16": vit(12, 16, ibot_head, wrap_ibot),
    "ibot_vitl16": vit(16, 16, ibot_head, wrap_ibot),
    "ibot_swin_tiny_w7": swin(7),
    "ibot_swin_tiny_w14": swin(14),
    "swav_resnet50": resnet(swav_head, wrap_swav, padded=True),
    "swav_resnet50w2": wide_resnet(2),
    "swav_resnet50w4": wide_resnet(4),
    "deepclusterv2_resnet50": resnet(partial(swav_head, sets=3), wrap_swav, padded=True),
    "msn_vits16": vit(6, 16, msn_head, wrap_msn),
    "msn_vitb16": vit(12, 16, msn_head, wrap_msn),
    "msn_vitb4": vit(12, 4, msn_head, wrap_msn),
    "msn_vitl16": vit(16, 16, msn_head, wrap_msn),
    "msn_vitl7": vit(16, 7, msn_head, wrap_msn, size=28),
    "mocov2_resnet50": resnet(moco_v2_head, wrap_moco_v2),
    "mocov2_resnet101": resnet(moco_v2_head, wrap_moco_v2),
    "mocov2_resnet152": resnet(moco_v2_head, wrap_moco_v2),
    "mocov3_vits16": vit(12, 16, moco_v3_head, wrap_moco_v3),
    "mocov3_vitb16": vit(12, 16, moco_v3_head, wrap_moco_v3),
    "dinov2_vits14": vit(6, 14, no_head, wrap_bare, size=28),
    "dinov2_vitb14": vit(12, 14, no_head, wrap_bare, size=28),
    "dinov2_vitl14": vit(16, 14, no_head, wrap_bare, size=28),
}

TRUE_WIDTHS: dict[str, Fixture] = {
    "dino_vits16": Fixture(
        partial(official.vit, dim=384, depth=12, heads=6, patch=16),
        partial(dino_head, hidden=2048, dim=256, num=65536),
        wrap_dino,
        size=224,
    ),
    "swav_resnet50": Fixture(
        partial(official.resnet, layers=(3, 4, 6, 3), padded=True),
        partial(swav_head, hidden=2048, dim=128, num=3000),
        wrap_swav,
        size=224,
    ),
    "msn_vits16": Fixture(
        partial(official.vit, dim=384, depth=12, heads=6, patch=16),
        partial(msn_head, hidden=2048, dim=256, num=1024),
        wrap_msn,
        size=224,
    ),
}


def load(name: str, fixture: Fixture, path: Path) -> Teacher:
    return load_teacher(TeacherConfig(name, path, fixture.arguments))
