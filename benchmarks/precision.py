"""What the memory layout and bfloat16 do for a teacher: images/s, and for the stand-in, whose weights are real, what is lost.

    rob bench precision

Rounds of the sides alternate. The ViT has random weights: the work is the same, its embeddings mean nothing.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rob.benchmarks.report import Report, parts
from rob.benchmarks.standin import TEACHER, TEACHER_SIZE
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.run import autocast, pick_device
from rob.common.teacher import embedder
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import get_recipe
from rob.teacher_cache.prototypes import PrototypeConfig, fit_prototypes
from rob.teacher_cache.teachers import Teacher, load_teacher

LAYOUTS = {"as torch has it": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True)
class PrecisionConfig:
    """``images`` of Fashion-MNIST for what is lost; the first of ``rounds`` warms up."""

    images: int = 1024
    prototypes: int = 256
    rounds: int = 8
    device: str = "auto"


def run(config: PrecisionConfig) -> Report:
    device = pick_device(config.device)
    stand_in = load_teacher(TEACHER).to(device)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0).to(device).eval()
    rows = _speeds(
        "EfficientNet-Lite0", stand_in, torch.randn(64, 3, TEACHER_SIZE, TEACHER_SIZE, device=device), config
    )
    rows += _speeds("ViT-S/16, random weights", vit, torch.randn(8, 3, 224, 224, device=device), config)
    rows.append({"teacher": "EfficientNet-Lite0, bf16 against fp32", **_lost(stand_in, config, device)})
    found: dict[tuple, Any] = {
        (row["teacher"], row.get("layout"), row.get("precision")): row.get("images_per_second") for row in rows
    }
    ratios = {}
    for name, short in (("EfficientNet-Lite0", "stand_in"), ("ViT-S/16, random weights", "vit")):
        plain, last = (found[name, layout, "fp32"] for layout in LAYOUTS)
        ratios[f"{short}_channels_last"] = last / plain
        ratios[f"{short}_bf16"] = found[name, "channels last", "bf16"] / last
    work = {
        "stand_in_px": TEACHER_SIZE,
        "images": config.images,
        "prototypes": config.prototypes,
        "rounds": config.rounds,
    }
    return Report.of("precision", device, work, rows, ratios)


def _speeds(name: str, network: nn.Module, images: Tensor, config: PrecisionConfig) -> list[dict[str, Any]]:
    def forward(layout: torch.memory_format, precision: str) -> None:
        network.to(memory_format=layout)
        with autocast(images.device, precision), torch.inference_mode():
            network(images).float().sum().item()

    sides: dict[tuple[str, str], Callable[[], None]] = {
        (layout, precision): partial(forward, LAYOUTS[layout], precision)
        for layout in LAYOUTS
        for precision in ("fp32", "bf16")
    }
    seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    for _ in parts(range(config.rounds)):
        for side, work in sides.items():
            work()  # the layout was changed: weights are packed anew
            start = time.perf_counter()
            work()
            seconds[side].append(time.perf_counter() - start)
    return [
        {
            "teacher": name,
            "layout": layout,
            "precision": precision,
            "images_per_second": len(images) / median(times[1:]),
        }
        for (layout, precision), times in seconds.items()
    ]


def _lost(teacher: Teacher, config: PrecisionConfig, device: torch.device) -> dict[str, float]:
    """bf16 against fp32: cosines of embeddings, and the nearest of prototypes fitted to the fp32 ones."""
    recipe, found = get_recipe("moco-v2"), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.beton"
        pack(PackConfig("fashion-mnist", path, raw=True, limit=config.images))
        for precision in ("fp32", "bf16"):
            embed = embedder(teacher, recipe, TEACHER_SIZE, device, precision)
            batches = ViewLoader(Beton(path), recipe, 0, LoaderConfig(batch_size=32)).epoch(
                np.arange(config.images), [ViewSet((0, 1), TEACHER_SIZE)]
            )
            found[precision] = F.normalize(torch.cat([embed(batch).cpu() for batch in batches]), dim=-1)
    full, half = found["fp32"], found["bf16"]
    prototypes = fit_prototypes(
        lambda start, stop: full[start:stop], len(full), PrototypeConfig(config.prototypes)
    ).prototypes
    cosines = (full * half).sum(-1)
    nearest = [(rows @ prototypes.T).argmax(-1) for rows in (full, half)]
    return {
        "mean_cosine": cosines.mean().item(),
        "lowest_cosine": cosines.min().item(),
        "same_nearest_prototype": (nearest[0] == nearest[1]).float().mean().item(),
    }


if __name__ == "__main__":
    report = run(PrecisionConfig())
    report.show()
    print(report.write())
