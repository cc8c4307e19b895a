"""The whole idea on real data in minutes: ``rob demo``.

Fashion-MNIST. The teacher is our own, self-supervised (``assets/teacher_fashion_mnist.md``); the student, a fourth of its
parameters, is trained once from the teacher's cached targets, and once in as many passes without a teacher. Same functions as
the commands.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from rob.benchmarks import standin
from rob.common.errors import MisuseError, unknown_name
from rob.common.files import replacing
from rob.common.images.pack import PackConfig, pack
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import RecipeOverrides, get_recipe
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.linear import LinearConfig, linear
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.export.config import ExportConfig
from rob.student_train.export.export import export
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.report.config import ReportConfig
from rob.student_train.report.report import report
from rob.student_train.students import StudentConfig, num_macs, num_parameters
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, TrainResult, train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

OURS = Path(__file__).parents[1] / "assets" / "teacher_fashion_mnist.safetensors"
TEACHERS = {
    "ours": (TeacherConfig("test_resnet", OURS), 24),
    standin.TEACHER.name: (standin.TEACHER, standin.TEACHER_SIZE),
}
"""Teachers, and the side in pixels of the views that they see. The second had labels."""
STUDENT = StudentConfig("test_efficientnet", image_size=24, small_images=True)


# Clothes on black, 28 px: gentler crops than for photographs, and no colour to jitter.
GENTLE = RecipeOverrides(global_scale=(0.4, 1.0), colour=0.5, grey=0.0, blur=0.0)
WRITTEN = ("train.beton", "test.beton", "targets.zarr", "student", "alone")
MARKS = ("demo.json", "summary.json")
"""What a folder of a demo has from its start, and at its end: no other is cleared."""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes chosen so that two slow cores take under five minutes. ``epochs`` are the distilled student's, of one view a step."""

    out: Path = Path("runs/demo")
    teacher: str = "ours"
    train_images: int = 10_000
    test_images: int = 2_000
    views: int = 2
    epochs: int = 5
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.teacher not in TEACHERS:
            raise unknown_name("teacher", self.teacher, TEACHERS)


@dataclass(frozen=True)
class DemoScreen:
    """What the demo shows while it runs: a line of text, and a progress bar for (done, total, text)."""

    note: Callable[[str], None]
    bar: Callable[[str, str], Any]


def begin(config: DemoConfig) -> None:
    """Clear the folder of what a demo before left. MisuseError: it holds something that no demo has made."""
    out = config.out
    others = [name for name in (*WRITTEN, "config.json") if (out / name).exists()]
    if others and not any((out / mark).exists() for mark in MARKS):
        raise MisuseError(f"{out} holds {others[0]}, and no demo has made it: give `out` a folder of its own")
    for name in WRITTEN:
        remove(out / name)
    with replacing(out / MARKS[0]) as file:
        file.write(json.dumps({"teacher": config.teacher, "seed": config.seed}).encode())


def run(config: DemoConfig, screen: DemoScreen) -> dict[str, Any]:
    """Run the demo; returns and writes ``summary.json``, and draws ``curve.png``. MisuseError: the teacher's file is missing,
    or the folder has files of somebody else."""
    out, device = config.out, pick_device(config.device)
    train_data, test_data, store = out / "train.beton", out / "test.beton", out / "targets.zarr"
    teacher_config, view_size = TEACHERS[config.teacher]
    teacher = load_teacher(teacher_config).to(device)
    begin(config)
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
    text = f"2. run the teacher once: {teacher.name}, {size_of(teacher.backbone, view_size)}, over {config.views} views an image"
    with stage("cache_teacher", text), screen.bar("caching", "images") as update:
        cache_teacher(
            CacheConfig(
                data=train_data,
                out=store,
                teacher=teacher_config,
                recipe=get_recipe("moco-v2", GENTLE),
                views=config.views,
                view_size=view_size,
                encoding=Encoding("embedding"),
                device=config.device,
                seed=config.seed,
                loader=LoaderConfig(batch_size=32),
            ),
            CacheProgress(rows=update, note=screen.note),
        )

    # ==== stage 2: the student, from the cache; and without a teacher, in as many passes ====
    losses: list[tuple[int, float]] = []

    def train(training: TrainConfig, losses: list[tuple[int, float]]) -> TrainResult:
        with screen.bar("training", "steps") as update:

            def log(line: dict[str, Any], total: int) -> None:
                losses.append((line["step"], line["loss"]))
                update(line["step"], total, f"loss {line['loss']:.4f}  {line['images_per_second']:,.0f} images/s")

            return train_student(training, progress=TrainProgress(log=log, note=screen.note))

    random_student = FrozenNetwork.random_student(STUDENT, config.seed, device)
    backbone = random_student.embed
    assert isinstance(backbone, nn.Module)
    text = f"3. train the student from the cache: {STUDENT.name}, {size_of(backbone, STUDENT.image_size)}"
    with stage("train_student", text):
        trained = train(distilled(config, store), losses)
    with stage("train_alone", "4. train it without a teacher (SwAV, as that was trained), in as many passes"):
        alone = train(without_teacher(config), [])

    # ==== what the features are worth ====
    networks = {
        "pixels": FrozenNetwork.pixels(STUDENT.image_size, device),
        "random_student": random_student,
        "student_without_teacher": FrozenNetwork.student(alone.weights, device),
        "distilled_student": FrozenNetwork.student(trained.weights, device),
        "teacher": FrozenNetwork.teacher(teacher, view_size, device),
    }
    accuracy: dict[str, dict[str, float]] = {"linear_top1": {}, "knn_top1": {}}
    with stage("evaluate", "5. what the frozen features are worth: a linear classifier, and k-NN (k = 20)"):
        for name, network in networks.items():
            train_set, test_set = (
                network.features(path, LoaderConfig(batch_size=100)) for path in (train_data, test_data)
            )
            accuracy["linear_top1"][name] = round(linear(train_set, test_set, LinearConfig(epochs=20)).top1, 2)
            accuracy["knn_top1"][name] = round(knn(train_set, test_set).top1, 2)
    with stage("export", "6. export the distilled student to ONNX, compared with torch; and a page of both runs"):
        page = ReportConfig(
            (out / "student", out / "alone"), out / "report.html", test=test_data, images=500, examples=4
        )
        for write in (
            lambda: export(ExportConfig(out / "student", data=test_data, images=200)),
            lambda: report(replace(page, overwrite=True, device=config.device)),
        ):
            try:
                write()
            except MisuseError as error:  # its packages are an extra
                screen.note(f"left out: {error}")

    summary = {
        **accuracy,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "student": {
            "name": STUDENT.name,
            "parameters": num_parameters(backbone),
            "images_per_second": trained.images_per_second,
            "data_wait": trained.data_wait,
        },
        "teacher": {"name": teacher.name, "parameters": num_parameters(teacher.backbone), "view_size": view_size},
        "images": {
            "train": config.train_images,
            "test": config.test_images,
            "views": config.views,
            "epochs": config.epochs,
        },
        "steps": {"distilled_student": trained.steps, "student_without_teacher": alone.steps},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(losses, accuracy, out / "curve.png")
    return summary


def distilled(config: DemoConfig, store: Path) -> TrainConfig:
    """It regresses the teacher's embedding of one view in each step."""
    return TrainConfig(
        data=config.out / "train.beton",
        out=config.out / "student",
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


def without_teacher(config: DemoConfig) -> TrainConfig:
    """SwAV: its own targets, of two views in each step, hence half the epochs, rounded up."""
    epochs = (config.epochs + 1) // 2
    return replace(
        distilled(config, Path()),
        out=config.out / "alone",
        targets=Momentum(get_recipe("moco-v2", GENTLE), prototypes=512),
        objective=ObjectiveConfig("swav", teacher_temp=0.01, sinkhorn="batch", hidden_dim=1024),
        pairing=PairingConfig("cross", step_targets=2, fresh=False),
        optimiser=OptimiserConfig("lars", lr=2.4, weight_decay=1e-5, warmup_epochs=0.5),
        freeze_prototypes=1,
        epochs=epochs,
        checkpoint_every=epochs,
    )


def size_of(network: nn.Module, side: int) -> str:
    return (
        f"{num_parameters(network) / 1e6:.2f} M parameters and {num_macs(network, side) / 1e6:.0f} M MACs at {side} px"
    )


def remove(path: Path) -> None:
    """What an earlier demo wrote: a run that is complete would not be trained again."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def draw(losses: list[tuple[int, float]], accuracy: dict[str, dict[str, float]], path: Path) -> None:
    """The loss over the steps, and the accuracies as bars."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*losses, strict=True), color="#2a6f97")
    left.set(xlabel="step", ylabel="loss", title="training from the cache", ylim=(0, None))
    left.spines[["top", "right"]].set_visible(False)
    names = list(accuracy["linear_top1"])
    for shift, (measure, colour) in zip(
        (-0.2, 0.2), (("linear_top1", "#2a6f97"), ("knn_top1", "#89c2d9")), strict=True
    ):
        places = [row + shift for row in range(len(names))]
        values = list(accuracy[measure].values())
        bars = right.barh(places, values, 0.38, color=colour)
        right.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    right.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    right.invert_yaxis()
    right.set(xlabel="top-1, %", title="linear (dark), k-NN (light)", xlim=(0, 105))
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
