"""The smallest real things that tests are made of: images, a packed data set, a teacher's checkpoint, a target store."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from rob.common.heads import ProjectionHead, Prototypes
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.teacher_cache import write
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig
from support.photographs import photograph

TEACHER = "test_efficientnet_gn"
"""Of timm's: 99,000 weights, fast at 32 px, and random ones already tell pictures apart (256-d, cosines from 0 to 1)."""


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    """``path`` is locked, as by another ``rob``, until the block ends and the process is killed."""
    script = "import sys, pathlib, rob.common.files as l; l.lock_file(pathlib.Path(sys.argv[1]), ''); print(flush=True)"
    words = [sys.executable, "-c", f"{script}; input()", str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        yield
        other.kill()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, by its relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def tiny_images(folder: Path, n: int, size: int = 32, seed: int = 0, classes: int = 2) -> Path:
    """``n`` distinct JPEG photographs of ``size`` x ``size`` pixels, in ``classes`` sub-folders by turns."""
    for row in range(n):
        path = folder / f"class{row % classes}" / f"{row:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(seed * 1_000_003 + row, size, size)).save(path, quality=92)
    return folder


def tiny_beton(folder: Path, n: int = 24, size: int = 32, seed: int = 0, raw: bool = False) -> Beton:
    """``tiny_images`` packed as ``folder/images-SEED.beton``."""
    images = tiny_images(folder / f"images-{seed}", n, size, seed)
    out = folder / f"images-{seed}.beton"
    pack(PackConfig(source=str(images), out=out, raw=raw, workers=1))
    return Beton(out)


def tiny_teacher_checkpoint(folder: Path, seed: int = 0, prototypes: int = 0, dim: int = 24) -> TeacherConfig:
    """``TEACHER`` with random weights as a safetensors file; with ``prototypes``, in DINO's layout with a head of ``dim``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = timm.create_model(TEACHER, num_classes=0)
        tensors = backbone.state_dict()
        if prototypes:
            head, rows = ProjectionHead(backbone.num_features, 32, dim), Prototypes(prototypes, dim)
            torch.nn.init.normal_(head.mlp[-1].weight, std=0.5)  # DINO's start would send every picture to one point
            tensors = {f"teacher.backbone.{name}": tensor for name, tensor in tensors.items()}
            tensors |= {f"teacher.head.{name}": tensor for name, tensor in head.state_dict().items()}
            tensors |= {f"teacher.head.last_layer.{name}": tensor for name, tensor in rows.state_dict().items()}
    path = folder / f"teacher-{seed}-{prototypes}.safetensors"
    save_file(tensors, path)
    return TeacherConfig(TEACHER, checkpoint=path)


def tiny_cache_config(out: Path, data: Beton, teacher: TeacherConfig, **changes: Any) -> CacheConfig:
    """Two 32 px views an image, embeddings in half precision, on the CPU; ``changes`` are CacheConfig's fields."""
    settings = {
        "recipe": get_recipe("dino"),
        "views": 2,
        "view_size": 32,
        "device": "cpu",
        "loader": LoaderConfig(batch_size=16, workers=1),
    }
    return CacheConfig(data.path, out, teacher, **(settings | changes))


def tiny_store(out: Path, data: Beton, teacher: TeacherConfig, **changes: Any) -> TargetStore:
    """What ``tiny_cache_config`` asks for, cached."""
    cache_teacher(tiny_cache_config(out, data, teacher, **changes))
    return TargetStore.open(out)


def answering(monkeypatch: pytest.MonkeyPatch, value: float, *image_ids: int) -> None:
    """The teacher's embeddings of the images become all ``value``."""

    def embedder(*args):
        embed = real(*args)

        def changed(batch, at_once=None):
            embedding = embed(batch, at_once)
            embedding[np.isin(batch.image_ids, image_ids)] = value
            return embedding

        return torch.inference_mode()(changed)

    real = write.embedder
    monkeypatch.setattr(write, "embedder", embedder)
