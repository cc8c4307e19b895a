"""Caching against its floor, the bare teacher: the same views, already decoded, in memory, through the same network.

    rob bench cache

What caching adds (decoding, augmenting, encoding, compressing, writing) runs beside the teacher, so it should cost nothing.
Rounds of the two sides alternate; the cached embeddings must equal the bare ones before the times count.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from rob.benchmarks.demo import TEACHER
from rob.benchmarks.report import Report
from rob.common.augment import augment
from rob.common.beton import Beton
from rob.common.encodings import Encoding
from rob.common.images import PackConfig, pack
from rob.common.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.run import autocast, pick_device
from rob.common.store import TargetStore
from rob.common.views import get_recipe
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher


@dataclass(frozen=True)
class CacheBenchConfig:
    """``data`` None packs ``images`` of Fashion-MNIST. The first of ``rounds`` warms up."""

    data: Path | None = None
    teacher: TeacherConfig = TEACHER
    view_size: int = 96
    recipe: str = "moco-v2"
    views: int = 2
    images: int = 512
    batch_size: int = 32
    rounds: int = 4
    precision: str = "fp32"
    device: str = "auto"


def run(config: CacheBenchConfig) -> Report:
    """Raises AssertionError when caching and the bare teacher disagree."""
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        return _run(config, device, Path(folder))


def _run(config: CacheBenchConfig, device: torch.device, folder: Path) -> Report:
    path = config.data or folder / "data.beton"
    if config.data is None:
        pack(PackConfig("fashion-mnist", path, raw=True, limit=config.images))
    data, recipe, loader = Beton(path), get_recipe(config.recipe), LoaderConfig(batch_size=config.batch_size)
    teacher = load_teacher(config.teacher).to(device)
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)

    ready = []
    views = ViewLoader(data, recipe, 0, loader)
    for batch in views.epoch(np.arange(data.num_images), [ViewSet(tuple(range(config.views)), config.view_size)]):
        pixels, colour = batch.views[0].to(device).flatten(0, 1), batch.colour[0].flatten(0, 1)
        ready.append(augment(pixels, colour, config.view_size / recipe.global_crops[0].size, mean, std))

    def bare() -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        with torch.inference_mode(), autocast(device, config.precision):
            outputs = [teacher(images).float() for images in ready]
        embeddings = torch.cat([output.cpu() for output in outputs])
        return time.perf_counter() - start, embeddings

    def caching() -> tuple[float, torch.Tensor]:
        store = folder / "targets.zarr"
        shutil.rmtree(store, ignore_errors=True)
        started: list[float] = []
        cache = CacheConfig(
            path,
            store,
            config.teacher,
            recipe,
            config.views,
            encoding=Encoding("embedding", "float32"),
            view_size=config.view_size,
            precision=config.precision,
            device=config.device,
            loader=loader,
        )
        # From the first batch asked for to the finished store; loading the teacher's weights is not counted.
        cache_teacher(cache, CacheProgress(rows=lambda done, total: started.append(time.perf_counter())))
        seconds = time.perf_counter() - started[0]
        found = TargetStore.open(store)
        return seconds, found.encoding.decode(found.read(0, data.num_images))["embedding"].flatten(0, 1)

    times: dict[str, list[float]] = {"bare teacher": [], "caching": []}
    for number in range(config.rounds):
        bare_seconds, expected = bare()
        caching_seconds, cached = caching()
        assert torch.allclose(cached, expected, atol=1e-4 if config.precision == "fp32" else 5e-2), (
            "caching differs from the teacher"
        )
        if number:
            times["bare teacher"].append(bare_seconds)
            times["caching"].append(caching_seconds)
    rows = [{"side": side, "images_per_second": data.num_images / median(seconds)} for side, seconds in times.items()]
    ratios = {"of_bare_teacher": median(b / c for b, c in zip(*times.values(), strict=True))}
    work = {
        "teacher": f"{config.teacher.name} at {config.view_size} px",
        "images": data.num_images,
        "views": config.views,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "rounds": config.rounds - 1,
    }
    return Report.of("cache", device, work, rows, ratios)


if __name__ == "__main__":
    report = run(CacheBenchConfig())
    report.show()
    print(report.write())
