"""Which objective, pairing, centre, and student or its average: k-NN and linear accuracy on real images, over seeds.

    python benchmarks/ablation.py TRAIN.beton TEST.beton runs/ablation [--seeds 3] [--epochs 6]
        [--students test_resnet:bf16 test_vit]

One teacher is cached once, and every run reads that store. A run that is done is not done again: killed, or called with more
seeds or students, it goes on. The EMA of the student comes from the same run. A student's name may be followed by the precision
that it trains fastest in on this machine.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

from rob.benchmarks.demo import TEACHER
from rob.benchmarks.kept import keep_settings
from rob.benchmarks.report import Report
from rob.common.images.beton import Beton
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import RecipeOverrides, get_recipe
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.linear import linear
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import load_teacher

AVERAGE = 0.99
"""Decay of the student's moving average: about the last epoch of these short runs."""


@dataclass(frozen=True)
class Schedule:
    """How a kind of student learns most in few steps."""

    lr: float
    batch_size: int
    warmup_epochs: float


CNN, VIT = Schedule(3e-3, 128, 1), Schedule(4e-3, 64, 0.5)
SCHEDULES = {"CNN": asdict(CNN), "ViT": asdict(VIT)}


@dataclass(frozen=True)
class Setting:
    """What one row of the table varies."""

    name: str
    pairing: str = "cross"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        extra = "".join(f" {name.replace('_', '-')}={value}" for name, value in self.options.items())
        return f"{self.name} {self.pairing}{extra}"


SETTINGS = (  # iBOT's loss on class tokens is DINO's, with the same head: the same run twice
    Setting("embedding", "same"),
    Setting("embedding", "cross"),
    Setting("disco", "same"),
    Setting("disco", "same", {"only_consistency": True}),
    Setting("moco", "cross"),
    Setting("dino", "same"),
    Setting("dino", "cross"),
    Setting("dino", "all"),
    Setting("dino", "cross", {"centre_targets": "calibration"}),
    Setting("dino", "cross", {"sinkhorn": "batch"}),
    Setting("dino", "same", {"sinkhorn": "batch"}),
    Setting("dino", "cross", {"head": "teacher"}),
    Setting("swav", "cross"),
    Setting("msn", "cross"),
    Setting("msn", "same"),
)


@dataclass(frozen=True)
class AblationConfig:
    train: Path
    test: Path
    out: Path
    students: tuple[str, ...] = ("test_resnet", "test_vit")
    """Names, each with ``:bf16`` or nothing behind it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 6
    views: int = 4
    teacher_size: int = 64
    prototypes: int = 1024
    device: str = "auto"


def run(config: AblationConfig) -> Report:
    device = pick_device(config.device)
    keep_settings(config.out, settings(config))
    store = cached_store(config)
    rows = []
    for student in config.students:
        rows.append({"student": student, "setting": "(random weights)", **random_student(config, student)})
        done = [[one_run(config, store, student, setting, seed) for setting in SETTINGS] for seed in config.seeds]
        for setting, results in zip(SETTINGS, zip(*done, strict=True), strict=True):
            row: dict[str, Any] = {"student": student, "setting": setting.label}
            for measure in ("knn_top1", "linear_top1", "average_knn_top1", "average_linear_top1"):
                values = [result[measure] for result in results]
                row[measure] = mean(values)
                if len(values) > 1:
                    row[f"{measure}_deviation"] = stdev(values)
            rows.append(row | {"train_seconds": mean(result["train_seconds"] for result in results)})
    rows.append({"student": "(teacher)", "setting": TEACHER.name, **teacher(config)})
    work = {
        "teacher": f"{TEACHER.name} at {config.teacher_size} px, {config.prototypes} fitted prototypes",
        "images": Beton(config.train).num_images,
        "test_images": Beton(config.test).num_images,
        **{name: value for name, value in asdict(config).items() if name in ("epochs", "views", "seeds")},
        "schedules": SCHEDULES,
        "average": AVERAGE,
    }
    return Report.of("ablation", device, work, rows, {})


def settings(config: AblationConfig) -> dict[str, Any]:
    """What all results in ``config.out`` depend on."""
    return {
        "train": Beton(config.train).manifest.fingerprint,
        "test": Beton(config.test).manifest.fingerprint,
        "device": pick_device(config.device).type,
        **{name: asdict(config)[name] for name in ("epochs", "views", "teacher_size", "prototypes")},
        "teacher": TEACHER.name,
        "schedules": SCHEDULES,
        "average": AVERAGE,
    }


def cached_store(config: AblationConfig) -> Path:
    store = config.out / "targets.zarr"
    if not (store / "zarr.json").exists():
        recipe = get_recipe("moco-v2", RecipeOverrides(global_scale=(0.4, 1.0), colour=0.5))
        cache_teacher(
            CacheConfig(
                config.train, store, TEACHER, recipe, config.views, encoding=Encoding("embedding"),
                view_size=config.teacher_size, prototypes=config.prototypes, device=config.device,
                loader=LoaderConfig(batch_size=32),
            )
        )  # fmt: skip
    return store


def one_run(config: AblationConfig, store: Path, student: str, setting: Setting, seed: int) -> dict[str, float]:
    folder = config.out / student.replace(":", "_") / setting.label.replace(" ", "_") / str(seed)
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    name, _, precision = student.partition(":")
    schedule = VIT if "vit" in name else CNN
    # dino's head is the teacher's by default; here a setting says so where it is.
    fresh: dict[str, Any] = {"head": "fresh"} if setting.name == "dino" else {}
    training = TrainConfig(
        data=config.train,
        out=folder,
        targets=Cached(store),
        student=StudentConfig(name, image_size=32, small_images=True),
        precision=precision or "fp32",
        objective=ObjectiveConfig(setting.name, **(fresh | setting.options)),
        pairing=PairingConfig(setting.pairing, step_targets=1 if setting.pairing == "same" else 2),
        optimiser=OptimiserConfig(lr=schedule.lr, warmup_epochs=schedule.warmup_epochs),
        epochs=config.epochs,
        average=AVERAGE,
        seed=seed,
        device=config.device,
        loader=LoaderConfig(batch_size=schedule.batch_size),
        checkpoint_every=config.epochs,
    )
    start = perf_counter()
    weights = train_student(training).weights
    result = {"train_seconds": perf_counter() - start}
    for prefix, path in (("", weights), ("average_", weights.with_name("student_average.safetensors"))):
        network = FrozenNetwork.student(path, pick_device(config.device))
        result |= {f"{prefix}{name}": value for name, value in measured(config, network).items()}
    done.write_text(json.dumps(result))
    print(student, setting.label, seed, {name: round(value, 2) for name, value in result.items()}, flush=True)
    return result


def measured(config: AblationConfig, network: FrozenNetwork) -> dict[str, float]:
    loader = LoaderConfig(batch_size=100)
    train, test = (network.features(path, loader) for path in (config.train, config.test))
    return {"knn_top1": knn(train, test).top1, "linear_top1": linear(train, test).top1}


def random_student(config: AblationConfig, student: str) -> dict[str, float]:
    student_config = StudentConfig(student.partition(":")[0], image_size=32, small_images=True)
    return measured(config, FrozenNetwork.random_student(student_config, 0, pick_device(config.device)))


def teacher(config: AblationConfig) -> dict[str, float]:
    device = pick_device(config.device)
    loaded = load_teacher(TEACHER).to(device)
    return measured(config, FrozenNetwork.teacher(loaded, config.teacher_size, device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--students", nargs="+", default=["test_resnet:bf16", "test_vit"])
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    report = run(
        AblationConfig(
            given.train, given.test, given.out, tuple(given.students), tuple(range(given.seeds)), given.epochs
        )
    )
    report.show()
    print(report.write())
