"""The whole idea on real data in minutes: ``rob demo``.

Fashion-MNIST; teacher EfficientNet-Lite0 at 96 px, run once; student a ResNet of 0.4 M parameters at 32 px, trained
from the cache.
The teacher is a supervised stand-in that needs no download: small, and not what the product is for. Same functions as
the commands.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rob.common.images.pack import PackConfig, pack
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import RecipeOverrides, get_recipe
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig, num_parameters
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

STUDENT = StudentConfig("test_resnet", image_size=32, small_images=True)
TEACHER = TeacherConfig("efficientnet_lite0")
TEACHER_SIZE = 96


@dataclass(frozen=True)
class DemoConfig:
    """Sizes chosen so that two cores take under eight minutes."""

    out: Path = Path("runs/demo")
    train_images: int = 10_000
    test_images: int = 2_000
    views: int = 2
    epochs: int = 8
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class DemoScreen:
    """What the demo shows while it runs: a line of text, and a progress bar for (done, total, text)."""

    note: Callable[[str], None]
    bar: Callable[[str, str], Any]


def run(config: DemoConfig, screen: DemoScreen) -> dict[str, Any]:
    """Run the demo; returns and writes ``summary.json``, and draws ``curve.png``."""
    out, device = config.out, pick_device(config.device)
    train_data, test_data, store = out / "train.beton", out / "test.beton", out / "targets.zarr"
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str, text: str) -> Iterator[None]:
        screen.note(f"\n{text}")
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)

    # ==== images ====
    with stage("pack", f"1. pack {config.train_images:,} + {config.test_images:,} images of Fashion-MNIST"):
        pack(PackConfig("fashion-mnist", train_data, raw=True, limit=config.train_images))
        pack(PackConfig("fashion-mnist", test_data, raw=True, split="test", limit=config.test_images))

    # ==== stage 1: the teacher, once ====
    teacher = load_teacher(TEACHER).to(device)
    text = f"2. run the teacher once: {teacher.name} at {TEACHER_SIZE} px over {config.views} views an image"
    # Clothes on black, 28 px: gentler crops than for photographs, and no colour to jitter.
    recipe = get_recipe("moco-v2", RecipeOverrides(global_scale=(0.4, 1.0), colour=0.5, grey=0.0, blur=0.0))
    with stage("cache_teacher", text), screen.bar("caching", "images") as update:
        cache_teacher(
            CacheConfig(
                data=train_data,
                out=store,
                teacher=TEACHER,
                recipe=recipe,
                views=config.views,
                view_size=TEACHER_SIZE,
                encoding=Encoding("embedding"),
                device=config.device,
                seed=config.seed,
                loader=LoaderConfig(batch_size=32),
            ),
            CacheProgress(rows=update, note=screen.note),
        )

    # ==== stage 2: the student, from the cache ====
    training = TrainConfig(
        data=train_data,
        out=out / "student",
        student=STUDENT,
        targets=Cached(store),
        objective=ObjectiveConfig("embedding"),
        pairing=PairingConfig("same", step_targets=1),
        optimiser=OptimiserConfig(lr=3e-3, warmup_epochs=1),
        epochs=config.epochs,
        device=config.device,
        seed=config.seed,
        loader=LoaderConfig(batch_size=128),
        checkpoint_every=config.epochs,
    )
    random_student = FrozenNetwork.random_student(STUDENT, config.seed, device)
    parameters = num_parameters(random_student.embed)  # type: ignore[arg-type]
    text = f"3. train the student from the cache: {STUDENT.name}, {parameters / 1e6:.2f} M parameters, at {STUDENT.image_size} px"
    losses: list[tuple[int, float]] = []
    with stage("train_student", text), screen.bar("training", "steps") as update:

        def log(line: dict[str, Any], total: int) -> None:
            losses.append((line["step"], line["loss"]))
            update(line["step"], total, f"loss {line['loss']:.4f}  {line['images_per_second']:,.0f} images/s")

        trained = train_student(training, progress=TrainProgress(log=log, note=screen.note))

    # ==== what the features are worth ====
    networks = {
        "pixels": FrozenNetwork.pixels(STUDENT.image_size, device),
        "random_student": random_student,
        "student": FrozenNetwork.student(trained.weights, device),
        "teacher": FrozenNetwork.teacher(teacher, TEACHER_SIZE, device),
    }
    accuracy: dict[str, float] = {}
    with stage("evaluate", "4. k-NN on the frozen features (k = 20)"):
        for name, network in networks.items():
            train, test = (network.features(path, LoaderConfig(batch_size=100)) for path in (train_data, test_data))
            accuracy[name] = round(knn(train, test).top1, 2)

    summary = {
        "knn_top1": accuracy,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "student": {
            "name": STUDENT.name,
            "parameters": parameters,
            "images_per_second": trained.images_per_second,
            "data_wait": trained.data_wait,
        },
        "images": {
            "train": config.train_images,
            "test": config.test_images,
            "views": config.views,
            "epochs": config.epochs,
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(losses, accuracy, out / "curve.png")
    return summary


def draw(losses: list[tuple[int, float]], accuracy: dict[str, float], path: Path) -> None:
    """The loss over the steps, and the accuracies as bars."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*losses, strict=True), color="#2a6f97")
    left.set(xlabel="step", ylabel="loss", title="training from the cache")
    left.spines[["top", "right"]].set_visible(False)
    names = [name.replace("_", " ") for name in accuracy]
    bars = right.barh(names, list(accuracy.values()), color=["#b8b8b8", "#b8b8b8", "#2a6f97", "#89c2d9"])
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    right.set(xlabel="k-NN top-1, %", title="frozen features", xlim=(0, 100))
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
