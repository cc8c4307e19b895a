"""Teachers by name: a frozen backbone with its published head and prototypes, loaded from a file or from timm."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import timm
import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import MisuseError, is_out_of_memory, unknown_name
from ..common.exported import StudentInfo, adapt_stem, described_in, read_metadata
from ..common.factories import is_factory
from ..common.heads import ACTIVATIONS, ProjectionHead
from ..common.own_network import OwnNetwork
from ..common.patches import feature_map
from ..common.pretrained import STAND_IN_BACKBONE, STAND_IN_MEAN, STAND_IN_STD, stand_in_tensors
from ..common.tensors import read_tensors
from ..common.tokens import check_tokens, is_dinov3, of_tokens, token_features
from ..common.weights import hash_weights
from .backbones import build_backbone, load_backbone, pretrained_backbone
from .checkpoints import Layout, Parts, take_apart
from .config import TeacherConfig
from .own_teacher import own_backbone
from .registry import DINO_LAYOUT, STAND_IN, TEACHERS, Entry

OUR_LAYOUT = Layout(
    backbone="backbone.", head="head.mlp.", prototypes="head.last_layer.", centre="centre", patch_centre="patch_centre"
)
"""Of the files of ``rob export-teacher``; a student's own file is a backbone without more."""

DINO_FINAL_TEMP = 0.07
"""Teacher temperature of a file in DINO's layout that no entry describes: where DINO's published schedules end."""


class Teacher(nn.Module):
    """A frozen network with or without a head: normalised images to L2-normalised embeddings, and those to logits.

    Always in eval mode, whatever ``train()`` asks (published code has let a teacher's BatchNorm adapt), and without
    gradients.
    """

    prototypes: Tensor | None
    """(K, dim) float32; logits are ``embedding @ prototypes.T``."""
    centre: Tensor | None
    """(K,) float32: DINO's running mean of the logits, where the file has it."""
    own_patch_prototypes: Tensor | None
    patch_centre: Tensor | None
    """(K,) float32: the same of patches, of an iBOT's file."""

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
        pooling: str | None = None,
        patch_prototypes: Tensor | None = None,
        patch_centre: Tensor | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone.to(memory_format=torch.channels_last)  # CNNs are 1.3 to 1.6 times as fast on a CPU
        self.head = head
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("centre", centre)
        # No part of the teacher's identity: stores of it are older than patch targets.
        self.register_buffer("own_patch_prototypes", patch_prototypes, persistent=False)
        self.register_buffer("patch_centre", patch_centre, persistent=False)
        self.teacher_temp = teacher_temp
        self.mean, self.std = mean, std
        self.view_size = view_size
        self.head_name = head_name
        self.pooling = pooling
        """What of the backbone's tokens is its feature; None: what the backbone itself pools, which needs no saying, so that
        stores and weights of such teachers are what they were before others could be asked for."""
        features: int = (1 + (pooling == "cls+mean")) * backbone.num_features  # type: ignore[operator]
        self.dim: int = head.out_dim if head else features
        self.weights_hash = hash_weights(self.state_dict(), pooling, code)
        self.requires_grad_(False).eval()

    @property
    def num_prototypes(self) -> int:
        """K, 0 without prototypes."""
        return 0 if self.prototypes is None else len(self.prototypes)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @property
    def patch_prototypes(self) -> Tensor | None:
        """(K, dim) float32 for patches: iBOT's own, or else those of images."""
        return self.prototypes if self.own_patch_prototypes is None else self.own_patch_prototypes

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, dim) float32, unit rows, of images (N, 3, H, W) normalised with ``mean`` and ``std``.

        Raises ``MisuseError`` for a size that the backbone can't take.
        """
        with self._sizes_named(images):
            features = token_features(self.backbone, images, self.pooling) if self.pooling else self.backbone(images)
        return self._projected(features)

    @torch.no_grad()
    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and what the backbone says of every position (N, C, h, w): patch tokens behind its last norm, or a CNN's last
        stage. One pass gives both. Raises ``MisuseError`` where it has no such map, too.
        """
        backbone: Any = self.backbone
        if isinstance(self.backbone, OwnNetwork):
            with self._sizes_named(images):
                pooled, features = self.backbone.with_map(images)
            return self._projected(pooled), features
        if not hasattr(backbone, "forward_features"):
            raise MisuseError(f"teacher {self.name} is no network of timm's and gives no map: do without `patches`")
        with self._sizes_named(images):
            features = backbone.forward_features(images)
            pooled = of_tokens(backbone, features, self.pooling) if self.pooling else backbone.forward_head(features)
        return self._projected(pooled), feature_map(backbone, features, f"teacher {self.name}")

    def _projected(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=1) if self.head is None else self.head(features)

    @contextmanager
    def _sizes_named(self, images: Tensor) -> Iterator[None]:
        """An image size that the backbone can't take is a MisuseError."""
        try:
            yield
        except (AssertionError, RuntimeError) as error:
            height, width = images.shape[-2:]
            if is_out_of_memory(error) or height == width == self.view_size:
                raise
            raise MisuseError(
                f"teacher {self.name} can't take views of {height}x{width} ({error}); its own size is {self.view_size}"
            ) from error

    @torch.no_grad()
    def logits(self, embedding: Tensor) -> Tensor:
        """Similarities (N, K) of embeddings (N, dim) to the prototypes, before centre and temperature."""
        if self.prototypes is None:
            raise MisuseError(
                f"teacher {self.name} has no prototypes; fit some with `prototypes`, or use the embeddings"
            )
        return embedding @ self.prototypes.T


def load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher of ``config``, on the CPU.

    Raises ``MisuseError`` for an unknown name, for a published teacher without its file, and for a file that does not
    fit: of another architecture, truncated, with code in it, or without the head that the teacher is known for; and for
    ``teacher_features`` of a network that has no such tokens, or of one whose head was trained on others.
    """
    if is_factory(config.name):
        backbone, told = own_backbone(config)
        return Teacher(config.name, backbone, code=config.name, **told)
    if config.name == STAND_IN and config.checkpoint is None:
        if config.backbone_args:
            raise MisuseError(f"`backbone_arg` is for timm's networks, and {STAND_IN} comes as it is: leave it out")
        teacher = _stand_in()
        if config.teacher_features:
            check_tokens(teacher.backbone, config.teacher_features, config.name, "teacher_features")
        return teacher
    if config.checkpoint is not None:
        metadata = read_metadata(config.checkpoint)
        info = described_in(metadata, config.checkpoint)
        if info is not None:
            return _our_own(config, config.checkpoint, info, metadata.get("teacher", "{}"))
    entry = TEACHERS.get(config.name) or _timm_entry(config.name)
    arguments = {**entry.backbone_args, **config.backbone_args}
    if config.checkpoint is not None:
        backbone = build_backbone(entry.backbone, arguments)
        parts = _parts(config.name, config.checkpoint, entry, backbone)
    elif entry.head:
        raise MisuseError(
            f"teacher {config.name} needs its file: pass `checkpoint` with {entry.file} ({entry.licence})"
        )
    else:
        backbone, parts = pretrained_backbone(entry.backbone, arguments), Parts()
    pooling = _pooling(config, backbone, parts, f"teacher {config.name}", entry.pooling)
    return Teacher(
        config.name,
        backbone,
        parts.head,
        parts.prototypes,
        parts.centre,
        teacher_temp=None if parts.prototypes is None else entry.teacher_temp,
        mean=entry.mean,
        std=entry.std,
        view_size=arguments.get("img_size", entry.view_size),
        head_name="none" if parts.head is None else entry.method,
        pooling=pooling,
        patch_prototypes=parts.patch_prototypes,
        patch_centre=parts.patch_centre,
    )


def _pooling(
    config: TeacherConfig, backbone: nn.Module, parts: Parts, whose: str, usual: str | None = None
) -> str | None:
    """What is taken of the backbone's tokens. MisuseError: there are none, or the head of ``whose`` takes others."""
    pooling = config.teacher_features or usual
    if config.teacher_features and parts.head is not None:
        raise MisuseError(
            f"`teacher_features` {pooling}: the head of {whose} takes what it was trained on, leave it out"
        )
    if pooling:
        check_tokens(backbone, pooling, config.name, "teacher_features")
    return pooling


def _our_own(config: TeacherConfig, path: Path, info: StudentInfo, made: str) -> Teacher:
    """The network of a file that ``rob`` wrote: what it says of itself is what is built, its small-image form included.

    MisuseError: it is another network than the one that was named, or what it says of its head is damaged.
    """
    if config.name != info.name:
        raise MisuseError(
            f"checkpoint {path} holds a {info.name}, and `teacher` is {config.name}: give `teacher` {info.name}"
        )
    try:
        said = {"method": "rob", "activation": "gelu", "teacher_temp": None} | json.loads(made)
        method, activation, temperature = str(said["method"]), said["activation"], said["teacher_temp"]
        if activation not in ACTIVATIONS or not (temperature is None or float(temperature) > 0):
            raise ValueError("a value is none that a head has")
    except (ValueError, TypeError) as error:
        raise MisuseError(f"{path}: its description of the head is damaged or made up ({error})") from error
    backbone = build_backbone(info.name, {**info.timm_kwargs, **config.backbone_args})
    if info.small_images:
        adapt_stem(backbone, info.output_stride, info.conv_stem)
    parts = _taken(config.name, path, replace(OUR_LAYOUT, activation=activation), backbone)
    pooling = _pooling(config, backbone, parts, str(path))
    return Teacher(
        config.name,
        backbone,
        parts.head,
        parts.prototypes,
        parts.centre,
        teacher_temp=None if parts.prototypes is None else temperature,
        mean=info.mean,
        std=info.std,
        view_size=info.image_size,
        head_name="none" if parts.head is None else method,
        pooling=pooling,
        patch_centre=parts.patch_centre,
    )


def _timm_entry(name: str) -> Entry:
    """Any timm model. A file with a head in DINO's layout brings it along: what ``rob`` and DINO's own code train."""
    models = {*timm.list_models(), *timm.list_pretrained()}
    if name not in models:
        raise unknown_name("teacher", name, [*TEACHERS, STAND_IN, *models], [*TEACHERS, STAND_IN])
    published = timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(pretrained_cfg=published.to_dict() if published else {})
    dinov3 = is_dinov3(name)
    return Entry(
        method="DINO",
        backbone=name,
        layout=DINO_LAYOUT,
        head="",
        num_prototypes=0,
        teacher_temp=DINO_FINAL_TEMP,
        licence="",
        file="",
        view_size=data["input_size"][-1],
        mean=data["mean"],
        std=data["std"],
        backbone_args={"global_pool": "token"} if dinov3 else {},
        pooling="cls" if dinov3 else None,
    )


def _parts(name: str, path: Path, entry: Entry, backbone: nn.Module) -> Parts:
    """What the file at ``path`` holds; ``backbone`` is filled with its part."""
    parts = _taken(name, path, entry.layout, backbone)
    if entry.head and parts.head is None:
        raise MisuseError(f"checkpoint {path} has no projection head, only a backbone; {name} needs {entry.file}")
    if entry.num_prototypes and parts.prototypes is None:
        raise MisuseError(f"checkpoint {path} has no prototypes; {name} needs {entry.file}")
    return parts


def _taken(name: str, path: Path, layout: Layout, backbone: nn.Module) -> Parts:
    """The parts of the file at ``path``, which fit each other; ``backbone`` is filled with its own."""
    parts = take_apart(read_tensors(path), layout)
    load_backbone(backbone, parts.backbone, name, path)
    features = backbone.num_features
    if parts.head is not None and parts.head.in_dim != features:
        raise MisuseError(f"checkpoint {path}: its head takes {parts.head.in_dim} numbers, {name} gives {features}")
    dim = features if parts.head is None else parts.head.out_dim
    if parts.prototypes is not None and parts.prototypes.shape[1] != dim:
        raise MisuseError(f"checkpoint {path}: its prototypes take {parts.prototypes.shape[1]} numbers, not {dim}")
    return parts


def _stand_in() -> Teacher:
    """EfficientNet-Lite0 with the ImageNet weights of a small package: supervised, for machines without downloads."""
    backbone = build_backbone(STAND_IN_BACKBONE, {})
    backbone.load_state_dict(stand_in_tensors(backbone, f"teacher {STAND_IN}"))
    return Teacher(STAND_IN, backbone, mean=STAND_IN_MEAN, std=STAND_IN_STD)
