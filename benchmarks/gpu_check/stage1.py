"""Stage 1: caching against the bare teacher, the same views in memory through the same network."""

import shutil
import time
from pathlib import Path

import numpy as np
import timm
import timm.data
import torch
from torch.nn.functional import normalize

from rob.benchmarks.gpu_check.images import MANY, photographs
from rob.benchmarks.gpu_check.section import Section
from rob.common.images.beton import Beton
from rob.common.run import allow_fast_arithmetic, autocast
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from rob.common.store.patches import PatchChoice
from rob.common.store.reader import TargetStore
from rob.common.teacher import cast_once
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet, resolve_loader
from rob.common.views.recipes import get_recipe
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import Teacher, TeacherConfig

RECIPE, VIEWS, MOST_VIEWS = "dino", 2, 4


def run(section: Section) -> None:
    few, many_images = photographs(section), photographs(section, MANY)
    small, large = section.size(
        ("test_vit", "test_vit"),
        ("vit_small_patch16_224",) * 2,
        ("vit_small_patch16_224", "vit_large_patch16_224"),
    )
    many = section.size(32, 65536, 65536)
    cases = [(small, "bf16", 0, MOST_VIEWS), (small, "bf16", many, MOST_VIEWS)]
    if large != small:
        cases.append((large, "bf16", many, VIEWS))
    cases.append((small, "fp32", 0, VIEWS))
    if large != small:
        cases.append((large, "fp32", 0, VIEWS))
    for name, precision, k, views in cases:
        words = f"{name}, {precision}, K {k}"
        data = many_images if name == small else few
        section.measure(
            words, lambda d=data, n=name, p=precision, k=k, v=views, w=words: _compare(section, d, n, p, k, v, w)
        )
    for row in section.rows:
        if "error" in row:
            section.checks.append({"check": row["what"], "passed": False, "error": row["error"]})


def random_teacher(name: str, device: torch.device, k: int) -> Teacher:
    """Of random weights, which are as much work; K random prototypes, or none."""
    torch.manual_seed(0)
    with device:
        backbone = timm.create_model(name, num_classes=0)
        rows = normalize(torch.randn(k, int(backbone.num_features)), dim=1) if k else None  # type: ignore[arg-type]
    size = timm.data.resolve_data_config(model=backbone)["input_size"][-1]
    return Teacher(name, backbone, prototypes=rows, teacher_temp=0.05 if k else None, view_size=size)


def cache(
    section: Section, out: Path, data: Beton, teacher: Teacher, precision: str, views: int = VIEWS
) -> tuple[float, float]:
    """Seconds of the store ``out``, from the first batch asked for to the last chunk written; and of finishing it, which does
    not grow with the images: 65,536 prototypes take half a second."""
    shutil.rmtree(out, ignore_errors=True)
    told: list[float] = []
    config = CacheConfig(
        data.path, out, TeacherConfig(teacher.name), get_recipe(RECIPE), views, encoding=Encoding("embedding", "float16"),
        patches=PatchChoice("none"), precision=precision,
        device=str(section.device), loader=LoaderConfig(batch_size=section.size(8, 128, 128)),
    )  # fmt: skip
    cache_teacher(config, CacheProgress(rows=lambda done, total: told.append(time.perf_counter())), teacher)
    return told[-1] - told[0], time.perf_counter() - told[-1]


def _compare(
    section: Section, data: Beton, name: str, precision: str, k: int, views: int, words: str
) -> dict[str, object]:
    device = section.device
    allow_fast_arithmetic(device, precision)  # as caching does: fp32 is TF32 for neither side
    teacher = random_teacher(name, device, k)
    batch_size = section.size(8, 128, 128)
    loading = resolve_loader(LoaderConfig(batch_size=batch_size), device)
    loader = ViewLoader(data, get_recipe(RECIPE), 0, loading)
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)
    ready = []
    for batch in loader.epoch(np.arange(data.num_images), [ViewSet(tuple(range(views)), teacher.view_size)]):
        scale = teacher.view_size / get_recipe(RECIPE).global_crops[0].size
        ready.extend(batch.to(device).augment(0, scale, mean, std).unbind(1))  # caching's batches are of one view
    network = cast_once(teacher, device, precision)

    def bare() -> torch.Tensor:
        with torch.inference_mode(), autocast(device, precision):
            outputs = [network(images).float() for images in ready]
        return torch.stack([torch.cat(outputs[view::views]) for view in range(views)], 1).flatten(0, 1)

    expected = bare()
    bare_seconds = section.seconds_of(bare, 2, 1)
    out = section.data / "stage1.zarr"
    cache(section, out, data, teacher, precision, views)
    seconds, finish_seconds = cache(section, out, data, teacher, precision, views)
    store = TargetStore.open(out)
    stored = decode(store.encoding, store.read(0, data.num_images))["embedding"].flatten(0, 1)
    limit = 2e-3 if device.type == "cpu" else 5e-2
    section.check(f"{words}: cached as the bare teacher says", (stored - expected.cpu()).norm(dim=1).max(), limit)
    count = data.num_images * views
    return {
        "loader": loading.backend,
        "images": data.num_images,
        "views_per_second": count / seconds,
        "bare_views_per_second": count / bare_seconds,
        "of_bare": bare_seconds / seconds,
        "finish_seconds": finish_seconds,
        "peak_gb": _peak(section),
    }


def _peak(section: Section) -> float | None:
    if section.device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak
