"""Training without a teacher on small real images: does it collapse, and which views suit a small network?

    python benchmarks/momentum.py TRAIN.beton TEST.beton runs/momentum [--students resnet18:bf16 mobilenetv2_100] [--seeds 1]
        [--epochs 20] [--image-size 32] [--test-size 32] [--num-local 6] [--only collapse|mobilenet|views]

Two tables, and a third by ``--only mobilenet``. ``collapse``: DINO, SwAV and MoCo-v2 with ``--targets momentum``; k-NN of the
student and of its momentum copy beside the random network and the pixels, and the targets' entropies at the end. ``views``: DINO
against a momentum copy and against cached targets of a teacher, each with the views of recipe ``dino`` and of ``sslight``, in as
many steps. ``mobilenet``: as ``collapse``, with settings for MobileNetV2 (``--students mobilenetv2_100``).

Local crops are smaller than global ones in the paper's proportion (96/224 and 128/224), rounded to what a ViT's patches of
4 px fill: 12 and 20 px beside 32. Crops have ``--image-size``: 16 is a quarter of the work, or less. Whole images have
``--test-size``: what is on them looks smaller than in a crop of the same size. Trained with MoCo on crops of 16 px, both
students were 2 to 3 points better on whole images of 32 px than of 16; MobileNetV2 trained with DINO was not. A
student's name may be followed by the precision that it trains fastest in on this machine. A run that is done is not done
again: killed, or called with more, it goes on.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rob.benchmarks.kept import keep_settings
from rob.benchmarks.report import Report
from rob.benchmarks.standin import TEACHER
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.config import PairingChoice
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.config import TargetsConfig
from rob.student_train.targets.momentum import Momentum, published
from rob.student_train.targets.pairing import choose_pairing
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import load_teacher

PROTOTYPES = 512
"""Of all objectives: the papers' 3000 to 4096 are for 1.3 million images."""
COPY_MOMENTUM = 0.99
"""Short runs want a faster copy than the papers' .996 and .999."""


@dataclass(frozen=True)
class Setting:
    """One row of a table. ``targets`` is momentum or cached, ``num_local`` None the benchmark's, ``copy_momentum`` the copy's.

    Rates are for 256 images; batches are small for the steps: DINO of 16 px crops brought the ResNet of 0.4 M parameters to 39.3
    in 10 epochs of 5,000 images with 32, and to 37.5 with 64.
    """

    objective: ObjectiveConfig
    recipe: str
    optimiser: OptimiserConfig
    batch_size: int = 32
    targets: str = "momentum"
    num_local: int | None = None
    copy_momentum: float = COPY_MOMENTUM

    @property
    def label(self) -> str:
        balanced = " sinkhorn" if self.objective.name == "dino" and self.objective.sinkhorn else ""
        quicker = f" {self.copy_momentum}" if self.copy_momentum != COPY_MOMENTUM else ""
        return f"{self.objective.name}{balanced}{quicker} {self.targets} {self.recipe}"


def lars(lr: float, weight_decay: float = 1e-5, trust: float | None = None) -> OptimiserConfig:
    """As the papers train CNNs. Of MobileNetV2 MoCo made in 8 epochs more than with AdamW in 20."""
    return OptimiserConfig("lars", lr=lr, weight_decay=weight_decay, trust=trust)


def adamw(lr: float) -> OptimiserConfig:
    return OptimiserConfig("adamw", lr=lr, weight_decay=0.04)


DINO = ObjectiveConfig("dino", teacher_temp=0.02)
"""Sharper than in the paper: at its last temperature, .07, targets were within 2 % of uniform after 800 steps."""
SWAV = ObjectiveConfig("swav", teacher_temp=0.01, sinkhorn="batch")
"""Sharper too: at the paper's .05 codes were uniform after 400 steps of a ResNet-18 (collapse.py says so at step 180). Without
a queue: its rows are of an encoder that this fast a learner has left behind, and a batch's codes become all alike."""
DISTILLED = ObjectiveConfig("dino", centre_targets="calibration", head="fresh")
"""The head is as a copy of the student has it: the views differ alone."""

COLLAPSE = (
    Setting(DINO, "sslight", lars(4.0)),
    Setting(SWAV, "sslight", lars(4.0), batch_size=64, num_local=0),
    Setting(ObjectiveConfig("moco"), "moco-v2", lars(1.6), batch_size=64),
)
VIEWS = tuple(
    Setting(objective, recipe, adamw(1.6e-2), targets=targets)
    for objective, targets in ((DINO, "momentum"), (DISTILLED, "cached"))
    for recipe in ("dino", "sslight")
)
SLIM_DINO = replace(DINO, hidden_dim=512)
SLIM_SWAV = replace(SWAV, hidden_dim=512)
BALANCED_DINO = replace(SLIM_DINO, teacher_temp=0.01, sinkhorn="batch")
MOBILENET = tuple(
    Setting(objective, "sslight", lars(lr, 1e-6, trust=0.02), 64, num_local=0, copy_momentum=copy_momentum)
    for objective, lr, copy_momentum in (
        (SLIM_DINO, 0.1, COPY_MOMENTUM),
        (BALANCED_DINO, 0.15, COPY_MOMENTUM),
        (BALANCED_DINO, 0.15, 0.9),
        (SLIM_SWAV, 0.15, COPY_MOMENTUM),
        (ObjectiveConfig("moco"), 0.15, COPY_MOMENTUM),
    )
)
"""What suits a slow learner: two global crops alone, since local ones of 8 and 12 px leave depthwise convolutions one position;
slower biases and norms; a narrower head over prototypes, so that more is left to the backbone."""
TABLES = {"collapse": COLLAPSE, "mobilenet": MOBILENET, "views": VIEWS}
USUAL = ("collapse", "views")


@dataclass(frozen=True)
class MomentumBenchConfig:
    """``num_local``: of the recipes with local crops; six as SSLight's CNNs have."""

    train: Path
    test: Path
    out: Path
    students: tuple[str, ...] = ("resnet18", "mobilenetv2_100")
    """Names, each with ``:bf16`` or nothing behind it."""
    seeds: tuple[int, ...] = (0,)
    epochs: int = 20
    image_size: int = 32
    test_size: int = 32
    num_local: int = 6
    tables: tuple[str, ...] = USUAL
    views: int = 4
    teacher_size: int = 64
    device: str = "auto"


def run(config: MomentumBenchConfig) -> Report:
    device = pick_device(config.device)
    for table in config.tables:
        keep_settings(config.out / table, settings(config, table))
    rows: list[dict[str, Any]] = []
    for size in sorted({config.image_size, config.test_size}):
        rows.append({"setting": f"(pixels, {size} px)", "knn_top1": top1(config, FrozenNetwork.pixels(size, device))})
    for table in config.tables:
        for student in config.students:
            tested = replace(student_config(config, student), image_size=config.test_size)
            network = FrozenNetwork.random_student(tested, 0, device)
            rows.append(
                {"table": table, "student": student, "setting": "(random weights)", "knn_top1": top1(config, network)}
            )
            done = [
                [one_run(config, table, student, setting, seed) for setting in TABLES[table]] for seed in config.seeds
            ]
            for setting, results in zip(TABLES[table], zip(*done, strict=True), strict=True):
                rows.append({"table": table, "student": student, "setting": setting.label, **summary(results)})
    if "views" in config.tables:
        rows.append(
            {"table": "views", "student": "(teacher)", "setting": TEACHER.name, "knn_top1": teacher_top1(config)}
        )
    work = {
        "images": Beton(config.train).num_images,
        "test_images": Beton(config.test).num_images,
        "prototypes": PROTOTYPES,
        "copy_momentum": COPY_MOMENTUM,
        "settings": {name: [asdict(setting) for setting in TABLES[name]] for name in config.tables},
        **{name: asdict(config)[name] for name in ("epochs", "image_size", "test_size", "seeds", "num_local")},
    }
    if "views" in config.tables:
        work["teacher"] = f"{TEACHER.name} at {config.teacher_size} px, {config.views} views cached"
    return Report.of("_".join(("momentum", *config.tables)), device, work, rows, {})


def settings(config: MomentumBenchConfig, table: str) -> dict[str, Any]:
    """What all results of a table depend on."""
    numbers = ("epochs", "image_size", "test_size", "num_local", "views", "teacher_size")
    return {
        "train": Beton(config.train).manifest.fingerprint,
        "test": Beton(config.test).manifest.fingerprint,
        "device": pick_device(config.device).type,
        **{name: asdict(config)[name] for name in numbers},
        "teacher": TEACHER.name,
        "prototypes": PROTOTYPES,
        "copy_momentum": COPY_MOMENTUM,
        "settings": [asdict(setting) for setting in TABLES[table]],
    }


def summary(results: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds of what all runs have, and the deviation of the accuracies."""
    row: dict[str, Any] = {name: mean(result[name] for result in results) for name in results[0]}
    if len(results) > 1:
        row["knn_top1_by_seed"] = [result["knn_top1"] for result in results]
        row["knn_top1_deviation"] = stdev(row["knn_top1_by_seed"])
    return row


def student_config(config: MomentumBenchConfig, student: str) -> StudentConfig:
    return StudentConfig(student.partition(":")[0], image_size=config.image_size, small_images=True)


def one_run(config: MomentumBenchConfig, table: str, student: str, setting: Setting, seed: int) -> dict[str, float]:
    """Train and measure, or read what was measured before."""
    folder = config.out / table / student.replace(":", "_") / setting.label.replace(" ", "_") / str(seed)
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    precision = student.partition(":")[2] or "fp32"
    targets = targets_of(config, setting)
    context = RunContext(Beton(config.train), pick_device(config.device), precision, seed, setting.objective)
    branch = targets.open(context)
    num_local = min(config.num_local if setting.num_local is None else setting.num_local, branch.recipe.num_local)
    fresh = setting.targets == "cached"
    training = TrainConfig(
        data=config.train,
        out=folder,
        student=student_config(config, student),
        targets=targets,
        objective=setting.objective,
        pairing=choose_pairing(
            setting.objective.name, branch.recipe, branch.views, PairingChoice(num_local=num_local, fresh=fresh)
        ),
        optimiser=replace(setting.optimiser, warmup_epochs=max(1, config.epochs / 10)),
        epochs=config.epochs,
        freeze_prototypes=0 if setting.objective.name == "moco" else 1,
        seed=seed,
        precision=precision,
        device=config.device,
        loader=LoaderConfig(batch_size=setting.batch_size),
    )
    trained = train_student(training)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    device = pick_device(config.device)
    result = {"knn_top1": top1(config, FrozenNetwork.student(trained.weights, device, config.test_size))}
    average = trained.weights.with_name("student_average.safetensors")
    if average.exists():
        result["copy_knn_top1"] = top1(config, FrozenNetwork.student(average, device, config.test_size))
    names = ("loss", "target_entropy", "mean_target_entropy", "target_std")
    result |= {name: lines[-1][name] for name in names if name in lines[-1]}
    result |= {"warnings": sum("warning" in line for line in lines), "steps": trained.steps}
    done.write_text(json.dumps(result))
    print(student, setting.label, seed, {name: round(value, 2) for name, value in result.items()}, flush=True)
    return result


def targets_of(config: MomentumBenchConfig, setting: Setting) -> TargetsConfig:
    if setting.targets == "cached":
        return Cached(cached_store(config, setting.recipe))
    usual = published(setting.objective.name)
    return Momentum(
        get_recipe(setting.recipe),
        prototypes=PROTOTYPES if usual.prototypes else None,
        copy_momentum=None if usual.copy_momentum is None else setting.copy_momentum,
        warmup_teacher_temp_epochs=0,
    )


def cached_store(config: MomentumBenchConfig, recipe: str) -> Path:
    """The teacher's targets for a recipe's views, cached once."""
    store = config.out / "views" / f"targets-{recipe}.zarr"
    try:
        TargetStore.open(store)
    except MisuseError:  # not there, or half-written
        cache_teacher(
            CacheConfig(
                config.train, store, TEACHER, get_recipe(recipe), config.views, encoding=Encoding("embedding"),
                view_size=config.teacher_size, prototypes=PROTOTYPES, device=config.device,
                loader=LoaderConfig(batch_size=32),
            )
        )  # fmt: skip
    return store


def top1(config: MomentumBenchConfig, network: FrozenNetwork) -> float:
    """k-NN on the test images, in percent."""
    loader = LoaderConfig(batch_size=100)
    train, test = (network.features(path, loader) for path in (config.train, config.test))
    return knn(train, test).top1


def teacher_top1(config: MomentumBenchConfig) -> float:
    device = pick_device(config.device)
    loaded = load_teacher(TEACHER).to(device)
    return top1(config, FrozenNetwork.teacher(loaded, config.teacher_size, device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--students", nargs="+", default=["resnet18", "mobilenetv2_100"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-local", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--test-size", type=int, default=32)
    parser.add_argument("--only", choices=tuple(TABLES))
    given = parser.parse_args()
    report = run(
        MomentumBenchConfig(
            given.train, given.test, given.out, tuple(given.students), tuple(range(given.seeds)), given.epochs,
            given.image_size, given.test_size, given.num_local, (given.only,) if given.only else USUAL,
        )
    )  # fmt: skip
    report.show()
    print(report.write())
