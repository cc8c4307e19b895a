"""The published teachers: architecture, head, temperatures, licence, and the file to fetch.

Layouts and figures are those of the official code and its issues (dino 40, 139, 188, 189; swav 6; msn 7; dinov2 119;
dinov3 84); nothing here was checked against a downloaded file. Widths, depths and K are only shown: the loader reads
them off the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ..common.pretrained import STAND_IN_BACKBONE, STAND_IN_PACKAGE
from .checkpoints import Layout

STAND_IN = "efficientnet_lite0"
"""The supervised teacher for machines that can't download: its weights come in a Python package."""


@dataclass(frozen=True)
class Entry:
    """One published teacher."""

    method: str
    backbone: str
    """A timm name, or one of ``backbones.WIDE_RESNETS``."""
    layout: Layout
    head: str
    """The projection MLP, for people; empty where none is published."""
    num_prototypes: int
    """K, for people; 0 where the method has none."""
    teacher_temp: float | None
    """Temperature of the softmax over the prototypes that the method's targets come from."""
    licence: str
    """Of the repository that publishes the weights."""
    file: str
    """Where the file lies; where the name does not tell, what it is called there."""
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    """Where the official network differs from timm's of that name."""
    view_size: int = 224
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    pooling: str | None = None
    """One of ``common.tokens.TOKENS`` where the released embedding is not what timm's network pools; None: it is."""


DINO_LAYOUT = Layout(
    branches=("teacher.",),
    backbone="backbone.",
    head="head.mlp.",
    prototypes="head.last_layer.",
    centre="dino_loss.center",
)
SWAV_LAYOUT = Layout(head="projection_head.", prototypes="prototypes.", activation="relu", unit_prototypes=True)
FB = "https://dl.fbaipublicfiles.com"
VIT_S16, VIT_B16, VIT_L16 = "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"

_dino = partial(
    Entry,
    method="DINO",
    layout=DINO_LAYOUT,
    head="2048-2048-256 GELU",
    num_prototypes=65536,
    teacher_temp=0.07,
    licence="Apache-2.0",
)
_ibot = partial(
    _dino,
    method="iBOT",
    layout=replace(
        DINO_LAYOUT,
        centre="ibot_loss.center",
        patch_centre="ibot_loss.center2",
        patch_prototypes="head.last_layer2.",
    ),
    num_prototypes=8192,
)
# iBOT's Swin keeps the smaller epsilon of its transformers, which timm's Swin does not.
_ibot_swin = partial(_ibot, backbone="swin_tiny_patch4_window7_224")
SWIN_NORM = {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}
# SwAV's targets are a Sinkhorn-Knopp assignment: its epsilon stands where others have a temperature. Its code, which is
# DeepCluster-v2's too, divides the red channel by .228, where ImageNet's deviation is .229.
_swav = partial(
    Entry,
    method="SwAV",
    layout=SWAV_LAYOUT,
    num_prototypes=3000,
    teacher_temp=0.05,
    licence="CC-BY-NC-4.0",
    std=(0.228, 0.224, 0.225),
)
# MSN sharpens p = softmax(logits / .1) to p^(1 / .25): one softmax at .025.
_msn = partial(
    Entry,
    method="MSN",
    layout=Layout(branches=("target_encoder.",), head="fc.", prototypes="prototypes", unit_prototypes=True),
    head="2048-2048-256 BN GELU",
    num_prototypes=1024,
    teacher_temp=0.025,
    licence="CC-BY-NC-4.0",
)
# The query encoder, as DisCo takes it.
_moco_v2 = partial(
    Entry,
    method="MoCo-v2",
    layout=Layout(branches=("encoder_q.", "encoder_k."), head="fc.", activation="relu"),
    head="2048-128 ReLU",
    num_prototypes=0,
    teacher_temp=None,
    licence="CC-BY-NC-4.0",
)
# The encoder that is trained, whose accuracy the paper has.
_moco_v3 = partial(
    _moco_v2,
    method="MoCo-v3",
    layout=Layout(branches=("base_encoder.", "momentum_encoder."), head="head.", activation="relu"),
    head="4096-4096-256 BN ReLU",
)
_headless = partial(Entry, layout=DINO_LAYOUT, head="", num_prototypes=0, teacher_temp=None)
_dinov2 = partial(_headless, method="DINOv2", licence="Apache-2.0")
# DINOv3's embedding is the class token; timm's Eva would take the mean of the patch tokens.
_dinov3 = partial(
    _headless,
    method="DINOv3",
    licence="DINOv3 licence",
    file="https://github.com/facebookresearch/dinov3 (on request)",
    backbone_args={"global_pool": "token"},
    pooling="cls",
)


def _dino_file(name: str) -> str:
    return f"{FB}/dino/dino_{name}_pretrain/dino_{name}_pretrain_full_checkpoint.pth"


def _ibot_file(row: str) -> str:
    return f"https://github.com/bytedance/ibot#pre-trained-models: {row}, 'full ckpt'"


def _disco_file(row: str) -> str:
    return f"https://github.com/Yuting-Gao/DisCo-pytorch#checkpoints: teacher {row}"


TEACHERS: dict[str, Entry] = {
    "dino_vits16": _dino(backbone=VIT_S16, file=_dino_file("deitsmall16")),
    "dino_vits8": _dino(backbone="vit_small_patch8_224", file=_dino_file("deitsmall8")),
    "dino_vitb16": _dino(backbone=VIT_B16, file=_dino_file("vitbase16")),
    "dino_vitb8": _dino(backbone="vit_base_patch8_224", file=_dino_file("vitbase8")),
    "dino_resnet50": _dino(
        backbone="resnet50", head="4096-256 BN GELU", num_prototypes=60000, file=_dino_file("resnet50")
    ),
    "dino_xcit_small_12_p16": _dino(backbone="xcit_small_12_p16_224", file=_dino_file("xcit_small_12_p16")),
    "dino_xcit_small_12_p8": _dino(backbone="xcit_small_12_p8_224", file=_dino_file("xcit_small_12_p8")),
    "dino_xcit_medium_24_p16": _dino(backbone="xcit_medium_24_p16_224", file=_dino_file("xcit_medium_24_p16")),
    "dino_xcit_medium_24_p8": _dino(backbone="xcit_medium_24_p8_224", file=_dino_file("xcit_medium_24_p8")),
    "ibot_vits16": _ibot(backbone=VIT_S16, file=_ibot_file("ViT-S/16")),
    "ibot_vitb16": _ibot(backbone=VIT_B16, file=_ibot_file("ViT-B/16")),
    "ibot_vitl16": _ibot(backbone=VIT_L16, file=_ibot_file("ViT-L/16")),
    "ibot_swin_tiny_w7": _ibot_swin(backbone_args=SWIN_NORM, file=_ibot_file("Swin-T/7")),
    "ibot_swin_tiny_w14": _ibot_swin(backbone_args={**SWIN_NORM, "window_size": 14}, file=_ibot_file("Swin-T/14")),
    "swav_resnet50": _swav(
        backbone="resnet50", head="2048-128 BN ReLU", file=f"{FB}/deepcluster/swav_800ep_pretrain.pth.tar"
    ),
    "swav_resnet50w2": _swav(
        backbone="resnet50w2", head="8192-128 BN ReLU", file=f"{FB}/deepcluster/swav_RN50w2_400ep_pretrain.pth.tar"
    ),
    "swav_resnet50w4": _swav(
        backbone="resnet50w4", head="8192-128 BN ReLU", file=f"{FB}/deepcluster/swav_RN50w4_400ep_pretrain.pth.tar"
    ),
    "deepclusterv2_resnet50": _swav(
        method="DeepCluster-v2",
        backbone="resnet50",
        head="2048-128 BN ReLU",
        teacher_temp=0.1,
        file=f"{FB}/deepcluster/deepclusterv2_800ep_pretrain.pth.tar",
    ),
    "msn_vits16": _msn(backbone=VIT_S16, file=f"{FB}/msn/vits16_800ep.pth.tar"),
    "msn_vitb16": _msn(backbone=VIT_B16, file=f"{FB}/msn/vitb16_600ep.pth.tar"),
    "msn_vitb4": _msn(backbone=VIT_B16, backbone_args={"patch_size": 4}, file=f"{FB}/msn/vitb4_300ep.pth.tar"),
    "msn_vitl16": _msn(backbone=VIT_L16, file=f"{FB}/msn/vitl16_600ep.pth.tar"),
    "msn_vitl7": _msn(backbone=VIT_L16, backbone_args={"patch_size": 7}, file=f"{FB}/msn/vitl7_200ep.pth.tar"),
    "mocov2_resnet50": _moco_v2(
        backbone="resnet50", file=f"{FB}/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"
    ),
    "mocov2_resnet101": _moco_v2(backbone="resnet101", file=_disco_file("ResNet101"), licence="none stated"),
    "mocov2_resnet152": _moco_v2(backbone="resnet152", file=_disco_file("ResNet152"), licence="none stated"),
    # MoCo-v3's small ViT has twelve heads of 32, where everybody else's has six: the tensors' shapes don't tell.
    "mocov3_vits16": _moco_v3(
        backbone=VIT_S16, backbone_args={"num_heads": 12}, file=f"{FB}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"
    ),
    "mocov3_vitb16": _moco_v3(backbone=VIT_B16, file=f"{FB}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"),
    "dinov2_vits14": _dinov2(
        backbone="vit_small_patch14_dinov2.lvd142m", file=f"{FB}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
    ),
    "dinov2_vitb14": _dinov2(
        backbone="vit_base_patch14_dinov2.lvd142m", file=f"{FB}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    ),
    "dinov2_vitl14": _dinov2(
        backbone="vit_large_patch14_dinov2.lvd142m", file=f"{FB}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
    ),
    "dinov3_vits16": _dinov3(backbone="vit_small_patch16_dinov3.lvd1689m"),
    "dinov3_vitb16": _dinov3(backbone="vit_base_patch16_dinov3.lvd1689m"),
    "dinov3_vitl16": _dinov3(backbone="vit_large_patch16_dinov3.lvd1689m"),
}
"""Every teacher with a name of its own."""


def teacher_table() -> list[dict[str, str]]:
    """The registry for people, a dictionary of column to text each row: what ``rob teachers`` prints."""
    rows = [
        {
            "name": name,
            "method": entry.method,
            "backbone": entry.backbone.split(".")[0],
            "published": _published(entry),
            "head": entry.head or "none published",
            "prototypes": str(entry.num_prototypes or "none"),
            "temperature": "" if entry.teacher_temp is None else f"{entry.teacher_temp:g}",
            "licence": entry.licence,
            "file": entry.file,
            "layout": _layout(entry),
        }
        for name, entry in TEACHERS.items()
    ]
    stand_in = {
        "name": STAND_IN,
        "method": "supervised",
        "backbone": STAND_IN_BACKBONE,
        "published": BACKBONE_ONLY,
        "head": "none published",
        "prototypes": "none",
        "temperature": "",
        "licence": "Apache-2.0",
        "file": f"pip install {STAND_IN_PACKAGE}",
        "layout": "of the package",
    }
    return [*rows, stand_in]


BACKBONE_ONLY = "backbone only"


def _published(entry: Entry) -> str:
    """Which parts the file has."""
    if not entry.head:
        return BACKBONE_ONLY
    return "MLP, prototypes" if entry.num_prototypes else "MLP"


def _layout(entry: Entry) -> str:
    """Under which names the file has its parts: ``teacher.*`` are all tensors whose names begin so."""
    if not entry.head:
        return "a backbone without more"
    layout = entry.layout
    names = {
        "encoder": " or ".join(f"{branch}*" for branch in layout.branches),
        "backbone": f"{layout.backbone}*",
        "head": f"{layout.head}*",
        "prototypes": layout.prototypes and entry.num_prototypes and f"{layout.prototypes}*",
        "centre": layout.centre,
    }
    return ", ".join(f"{part} {name}" for part, name in names.items() if name)
