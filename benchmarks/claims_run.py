"""One run of ``claims.py``: trained as its row says, and measured."""

import json
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from rob.benchmarks.claims_config import ClaimsConfig, Job
from rob.benchmarks.claims_rows import COPY_MOMENTUM, STUDENTS, USES_STORE, Row, kind_of
from rob.benchmarks.labels import UNLIMITED, Labels, tuned_teacher
from rob.common.files import replacing
from rob.common.run import pick_device
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.evaluate.config import FinetuneConfig
from rob.student_train.evaluate.knn import knn_hits
from rob.student_train.evaluate.linear import LinearConfig, linear
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.config import TargetsConfig
from rob.student_train.targets.momentum import Momentum, published
from rob.student_train.targets.online import Online
from rob.student_train.targets.with_copy import WithCopy
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.teachers import Teacher, load_teacher

IMAGE_SIZE, LOCAL_SIZE = 32, 16
"""Pixels a side of the student's global and local crops."""
AVERAGE = 0.99
"""Decay of the student's moving average, where it has no copy."""


def one_run(config: ClaimsConfig, job: Job) -> None:
    """Train, measure, and leave ``result.json``."""
    torch.set_num_threads(config.threads)
    device, start = pick_device(config.device), perf_counter()
    result: dict[str, Any] = {"student": job.student, "row": job.row.name, "seed": job.seed, "of": made_of(job)}
    if job.row.objective is None:
        networks = {"": FrozenNetwork.random_student(student_config(job.student), job.seed, device)}
    else:
        trained = train_student(training(config, job))
        networks = {"": FrozenNetwork.student(trained.weights, device)}
        average = trained.weights.with_name("student_average.safetensors")
        if average.exists():
            networks["average_"] = FrozenNetwork.student(average, device)
        result |= {"loss": trained.loss, "steps": trained.steps, "images_per_second": trained.images_per_second}
        result |= {"shares": trained.shares, "images_seen": trained.steps * config.batch_size}
    result["train_seconds"] = perf_counter() - start
    for prefix, network in networks.items():
        result |= {prefix + name: value for name, value in measured(config, network).items()}
    result["seconds"] = perf_counter() - start
    with replacing(job.result(config.out)) as file:
        file.write((json.dumps(result) + "\n").encode())
    (job.folder(config.out) / "checkpoint.pt").unlink(missing_ok=True)
    shown = {name: round(value, 2) for name, value in result.items() if isinstance(value, float)}
    print(job, shown, flush=True)


def made_of(job: Job) -> dict[str, Any]:
    """What the row is, as JSON has it: its options and its optimiser, not the words of the table."""
    kind = kind_of(STUDENTS.get(job.student.partition(":")[0], job.student))
    optimiser = None if job.row.objective is None else asdict(job.row.optimiser(kind))
    row = {name: value for name, value in asdict(job.row).items() if name not in ("title", "besides", "against")}
    return json.loads(json.dumps({**row, "optimiser": optimiser, "copy_momentum": COPY_MOMENTUM}))


def student_config(student: str) -> StudentConfig:
    name = student.partition(":")[0]
    # MSN's drop of patches is left out: the student is to have the same work in every row.
    return StudentConfig(STUDENTS.get(name, name), image_size=IMAGE_SIZE, small_images=True, patch_drop=0.0)


def training(config: ClaimsConfig, job: Job) -> TrainConfig:
    """The settings of a run."""
    name, _, precision = job.student.partition(":")
    row, kind = job.row, kind_of(STUDENTS.get(name, name))
    epochs = row.epochs(config.epochs, config.num_local, IMAGE_SIZE, LOCAL_SIZE)
    return TrainConfig(
        data=config.train,
        out=job.folder(config.out),
        targets=targets_of(config, row),
        student=student_config(job.student),
        precision=precision or "fp32",
        objective=row.fitted_objective(kind, config.teacher_temp),
        pairing=row.pairing(config.num_local, IMAGE_SIZE, LOCAL_SIZE),
        optimiser=replace(row.optimiser(kind), warmup_epochs=min(1.0, epochs / 4)),
        epochs=epochs,
        local_size=LOCAL_SIZE,
        average=None if row.has_copy else AVERAGE,
        seed=job.seed,
        device=config.device,
        loader=LoaderConfig(batch_size=config.batch_size, workers=config.threads),
        checkpoint_every=epochs,
        log_every=50,
    )


def targets_of(config: ClaimsConfig, row: Row) -> TargetsConfig:
    """Where the row's targets come from."""
    recipe = get_recipe(row.recipe or config.recipe)
    if row.kind == "labels":
        return Labels(recipe)
    if row.kind == "momentum":
        usual = published(str(row.objective))
        return Momentum(
            recipe,
            config.prototypes if usual.prototypes else None,
            None if usual.copy_momentum is None else COPY_MOMENTUM,
            warmup_teacher_temp_epochs=0,
        )
    if row.kind in USES_STORE:
        cached = Cached(config.store_of(row), cache_in_memory=True)
        return WithCopy(cached, copy_momentum=COPY_MOMENTUM) if row.kind == "copy" else cached
    assert config.teacher is not None, "prepare() asks for it"
    teacher = load_teacher(config.teacher)
    size = config.teacher_size or teacher.view_size
    teacher = tuned(config, teacher) if row.kind == "tuned" else teacher
    return Online(teacher.to(pick_device(config.device)), recipe, UNLIMITED, size)


def tuned(config: ClaimsConfig, teacher: Teacher) -> Teacher:
    """The teacher fine-tuned with the training images' labels."""
    size, loader = config.teacher_size or teacher.view_size, LoaderConfig(batch_size=128, workers=config.workers)
    return tuned_teacher(
        teacher, config.train, config.test, size, FinetuneConfig(config.finetune_epochs), loader, config.tuned_path
    )


def measured(config: ClaimsConfig, network: FrozenNetwork) -> dict[str, Any]:
    """Accuracies in percent, and which test images k-NN gets right, as the hexadecimal digits of their bits."""
    loader = LoaderConfig(batch_size=500, workers=config.threads)
    train, test = (network.features(path, loader).to(network.device) for path in (config.train, config.test))
    hits = knn_hits(train, test).cpu()
    linear_top1 = linear(train, test, LinearConfig(epochs=config.linear_epochs)).top1
    found = {"knn_top1": 100 * hits.double().mean().item(), "linear_top1": linear_top1}
    return found | {"knn_hits": np.packbits(hits.numpy()).tobytes().hex()}
