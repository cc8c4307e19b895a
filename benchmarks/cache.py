"""Caching against its floor, the bare teacher: the same views, decoded and normalised, in memory, through the same network.

    rob bench cache

Decoding, augmenting, encoding, compressing and writing run beside the teacher. On a CPU all of it shares the cores, so the
smaller the teacher, the more it shows: measured for a ViT-S/16 on photographs (random weights: the work is the same) and
for the little stand-in. Rounds of the two sides alternate, as does who begins; the cached embeddings must equal the bare ones.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from rob.benchmarks.photographs import make_photographs
from rob.benchmarks.report import Report, parts
from rob.benchmarks.standin import TEACHER, TEACHER_SIZE
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.run import autocast, pick_device
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from rob.common.store.patches import PatchChoice
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet, resolve_loader
from rob.common.views.recipes import get_recipe
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

VIT = "vit_small_patch16_224"


@dataclass(frozen=True)
class CacheBenchConfig:
    """Images of each case: ``photographs`` for the ViT, ``small_images`` for the stand-in. The first of ``rounds`` warms up; of
    the stand-in there are ``small_rounds``, since those of a few seconds vary most."""

    photographs: int = 128
    small_images: int = 512
    recipe: str = "moco-v2"
    views: int = 2
    batch_size: int = 32
    rounds: int = 6
    small_rounds: int = 24
    precision: str = "fp32"
    device: str = "auto"


@dataclass(frozen=True)
class Case:
    name: str
    data: Path
    teacher: TeacherConfig
    view_size: int


def run(config: CacheBenchConfig) -> Report:
    """Raises AssertionError when caching and the bare teacher disagree."""
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_photographs(folder / "photographs", config.photographs)
        pack(PackConfig(str(folder / "photographs"), folder / "photographs.beton"))
        pack(PackConfig("fashion-mnist", folder / "small.beton", raw=True, limit=config.small_images))
        save_file(timm.create_model(VIT, num_classes=0).state_dict(), folder / "vit.safetensors")
        vit = TeacherConfig(VIT, folder / "vit.safetensors")
        cases = (
            Case("ViT-S/16 at 224 px, photographs", folder / "photographs.beton", vit, 224),
            Case(
                f"EfficientNet-Lite0 at {TEACHER_SIZE} px, Fashion-MNIST", folder / "small.beton", TEACHER, TEACHER_SIZE
            ),
        )
        rounds = config.rounds, config.small_rounds
        rows = [_compare(case, config, n, device, folder) for case, n in zip(cases, rounds, strict=True)]
    ratios = {"of_bare_teacher": rows[0]["of_bare_teacher"], "of_bare_small_teacher": rows[1]["of_bare_teacher"]}
    work = {
        "photographs": config.photographs,
        "cut_out_of": source,
        "small_images": config.small_images,
        "views": config.views,
        "recipe": config.recipe,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "rounds": [n - 1 for n in rounds],
    }
    return Report.of("cache", device, work, rows, ratios)


def _compare(case: Case, config: CacheBenchConfig, rounds: int, device: torch.device, folder: Path) -> dict[str, Any]:
    data, recipe, loader = Beton(case.data), get_recipe(config.recipe), LoaderConfig(batch_size=config.batch_size)
    teacher = load_teacher(case.teacher).to(device)
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)

    ready = []
    views = ViewLoader(data, recipe, 0, resolve_loader(loader, device))
    for batch in views.epoch(np.arange(data.num_images), [ViewSet(tuple(range(config.views)), case.view_size)]):
        views_of = batch.to(device).augment(0, case.view_size / recipe.global_crops[0].size, mean, std)
        ready.extend(views_of.unbind(1))  # as caching does, whose batches are of one view

    def bare() -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        with torch.inference_mode(), autocast(device, config.precision):
            outputs = [teacher(images).float() for images in ready]
        of_views = [
            torch.cat([output.cpu() for output in outputs[view :: config.views]]) for view in range(config.views)
        ]
        return time.perf_counter() - start, torch.stack(of_views, 1).flatten(0, 1)

    def caching() -> tuple[float, torch.Tensor]:
        store = folder / "targets.zarr"
        shutil.rmtree(store, ignore_errors=True)
        started: list[float] = []
        cache = CacheConfig(
            case.data,
            store,
            case.teacher,
            recipe,
            config.views,
            encoding=Encoding("embedding", "float32"),
            patches=PatchChoice("none"),
            view_size=case.view_size,
            precision=config.precision,
            device=config.device,
            loader=loader,
        )
        # From the first batch asked for to the finished store; loading the teacher's weights is not counted.
        cache_teacher(cache, CacheProgress(rows=lambda done, total: started.append(time.perf_counter())))
        seconds = time.perf_counter() - started[0]
        found = TargetStore.open(store)
        return seconds, decode(found.encoding, found.read(0, data.num_images))["embedding"].flatten(0, 1)

    times: dict[str, list[float]] = {"bare": [], "caching": []}
    for number in parts(range(rounds)):
        if number % 2:
            (bare_seconds, expected), (caching_seconds, cached) = bare(), caching()
        else:
            (caching_seconds, cached), (bare_seconds, expected) = caching(), bare()
        assert torch.allclose(cached, expected, atol=1e-4 if config.precision == "fp32" else 5e-2), (
            "caching differs from the teacher"
        )
        if number:
            times["bare"].append(bare_seconds)
            times["caching"].append(caching_seconds)
    speeds = {f"{side}_images_per_second": data.num_images / median(seconds) for side, seconds in times.items()}
    ratio = median(b / c for b, c in zip(times["bare"], times["caching"], strict=True))
    return {"teacher": case.name, **speeds, "of_bare_teacher": ratio}


if __name__ == "__main__":
    report = run(CacheBenchConfig())
    report.show()
    print(report.write())
