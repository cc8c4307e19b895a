"""Does the tiled loss train as the plain formula does? Loss curves of the same run with `reference` and with `auto`.

    python benchmarks/loss_curves.py [TRAIN.beton]

Objective dino with prototypes fitted to the stand-in teacher; without a file, the demo's images. Both runs have the same seed,
views and steps, so their curves differ by rounding only, which training amplifies as it goes on.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rob.benchmarks.report import Report
from rob.benchmarks.standin import STUDENT, TEACHER
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import RecipeOverrides, get_recipe
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher


@dataclass(frozen=True)
class LossCurvesConfig:
    """``data`` None packs ``images`` of Fashion-MNIST."""

    data: Path | None = None
    images: int = 5000
    teacher_size: int = 64
    prototypes: int = 2048
    epochs: int = 4
    batch_size: int = 128
    device: str = "auto"


def run(config: LossCurvesConfig) -> Report:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = config.data or folder / "data.beton"
        if config.data is None:
            pack(PackConfig("fashion-mnist", data, raw=True, limit=config.images))
        store, loader = folder / "targets.zarr", LoaderConfig(batch_size=config.batch_size)
        cache_teacher(
            CacheConfig(
                data, store, TEACHER, get_recipe("moco-v2", RecipeOverrides(global_scale=(0.4, 1.0), colour=0.5)),
                views=2, encoding=Encoding("embedding", "int8"), view_size=config.teacher_size,
                prototypes=config.prototypes, device=config.device, loader=LoaderConfig(batch_size=32),
            )
        )  # fmt: skip

        def curve(impl: str) -> list[float]:
            out = folder / impl
            train_student(
                TrainConfig(
                    data=data, out=out, targets=Cached(store), student=STUDENT,
                    objective=ObjectiveConfig("dino", head="fresh", loss_impl=impl),
                    optimiser=OptimiserConfig(lr=1e-3, warmup_epochs=1),
                    epochs=config.epochs, device=config.device, loader=loader, log_every=1,
                    checkpoint_every=config.epochs,
                )
            )  # fmt: skip
            lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            return [line["loss"] for line in lines if "loss" in line]

        reference, auto = curve("reference"), curve("auto")
        differences = [abs(a - b) / abs(a) for a, b in zip(reference, auto, strict=True)]
        rows = [
            {
                "steps": f"1 to {stop}",
                "reference": reference[stop - 1],
                "auto": auto[stop - 1],
                "largest_relative_difference": max(differences[:stop]),
            }
            for stop in (1, 10, 30, len(differences))
        ]
        work = {
            "data": "fashion-mnist" if config.data is None else config.data.stem,
            "images": Beton(data).num_images,
            "prototypes": config.prototypes,
            "epochs": config.epochs,
            "batch_size": config.batch_size,
        }
    return Report.of(
        "loss_curves", pick_device(config.device), work, rows, {"largest_relative_difference": max(differences)}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    report = run(LossCurvesConfig(given.train))
    report.show()
    print(report.write(given.out))
