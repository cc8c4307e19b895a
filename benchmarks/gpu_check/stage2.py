"""Stage 2: students trained from a cache, with each loader; and a run that is stopped and goes on."""

import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from rob.benchmarks.gpu_check.images import photographs
from rob.benchmarks.gpu_check.section import Section
from rob.benchmarks.gpu_check.stage1 import RECIPE, VIEWS, cache, random_teacher
from rob.common.images.beton import Beton
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.config import ObjectiveConfig, OptimiserConfig, PairingConfig
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.plan import make_plan
from rob.student_train.student_config import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online
from rob.student_train.targets.space import TargetSpace
from rob.student_train.train import TrainProgress, train_student
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer
from rob.teacher_cache.teachers import Teacher


def run(section: Section) -> None:
    data = photographs(section)
    store = section.data / "stage2.zarr"
    if not (store / "zarr.json").exists():
        cache(section, store, data, _teacher(section), _precision(section))
    students = section.size(
        [("test_resnet", 32)],
        [("resnet18", 224), ("vit_tiny_patch16_224", 224)],
        [("resnet18", 224), ("mobilenetv2_100", 224), ("vit_tiny_patch16_224", 224)],
    )
    (name, size), *others = students

    def speed_of(student: str, size: int, loader: str, compiled: str = "off") -> float | None:
        words = f"{student} at {size} px, loader {loader}{', compiled' * (compiled != 'off')}"
        row = section.measure(words, lambda: _train(section, data, store, student, size, loader, compiled, words))
        return row.get("images_per_second") if row else None

    speeds = {loader: speed_of(name, size, loader) for loader in (("gpu", "ffcv") if _cuda(section) else ("auto",))}
    if len(speeds) == 2 and all(speeds.values()):
        section.settings["loader"] = max(speeds, key=lambda name: speeds[name] or 0)
    section.attempt("stopped and resumed", lambda: _resume(section, data, store))
    section.attempt("a live teacher", lambda: _live(section, data, store))
    loader = section.settings.get("loader", "auto")
    section.measure("plan of a run that leaves all open", lambda: _plan(section, data, store))
    for student, side in others:
        speed_of(student, side, loader)
    for how in ("off", *(("default", "reduce-overhead") if _cuda(section) and section.left() > COMPILING else ())):
        section.measure(f"step of {SMALL} at 32 px, compile {how}", lambda h=how: _small_step(section, data, store, h))
    if _cuda(section) and section.left() > COMPILING and (compiled := speed_of(name, size, loader, "default")):
        faster = compiled > WORTH_COMPILING * (speeds.get(loader) or 0)
        section.settings["compile"] = "default" if faster else "off"
    for row in section.rows:
        if "error" in row:
            section.checks.append({"check": row["what"], "passed": False, "error": row["error"]})


COMPILING = 60
"""Seconds that must be left for a student to be compiled."""
SMALL = "resnet10t"
"""A student whose kernels take longer to launch than to run."""
LONGEST_PLAN = 90.0
"""Seconds after which a user takes a plan for hung: it was more than that once, of cuDNN's search in every step that it tried."""
WORTH_COMPILING = 1.1
"""Times as many images a second, for which the minutes of compiling are worth while."""


def _cuda(section: Section) -> bool:
    return section.device.type == "cuda"


def _precision(section: Section) -> str:
    return "bf16" if _cuda(section) else "fp32"


def _teacher(section: Section) -> Teacher:
    name, k = section.size(("test_vit", 32), ("vit_small_patch16_224", 65536), ("vit_small_patch16_224", 65536))
    return random_teacher(name, section.device, k)


def _config(
    section: Section,
    data: Beton,
    store: Path,
    out: Path,
    student: str,
    size: int,
    loader: str,
    compiled: str | None = "off",
) -> TrainConfig:
    batch = section.size(8, 128, 128)
    return TrainConfig(
        data.path,
        out,
        StudentConfig(student, size, small_images=section.toy),
        Cached(store),
        ObjectiveConfig("dino", hidden_dim=section.size(16, 2048, 2048)),
        PairingConfig("cross", 2, num_local=section.size(2, 6, 6)),
        OptimiserConfig(lr=1e-3, warmup_epochs=0),
        epochs=2,
        precision=_precision(section),
        device=str(section.device),
        compile=compiled,
        loader=LoaderConfig(loader, batch_size=batch),
        log_every=1,
    )


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _train(
    section: Section, data: Beton, store: Path, student: str, size: int, loader: str, compiled: str, words: str
) -> dict[str, Any]:
    out = section.data / "run"
    shutil.rmtree(out, ignore_errors=True)
    if _cuda(section):
        torch.cuda.reset_peak_memory_stats()
    train_student(_config(section, data, store, out, student, size, loader, compiled))
    lines = _log(out)
    first, last = (median(line["loss"] for line in some) for some in (lines[:3], lines[-3:]))
    section.check(f"{words}: the loss falls", last - first, 0.0)
    settled = lines[len(lines) // 2 :]  # what is compiled at first is not counted
    return {
        "images_per_second": median(line["images_per_second"] for line in settled),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        **{f"{name}_share": median(line["shares"][name] for line in settled) for name in lines[0]["shares"]},
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if _cuda(section) else None,
    }


def _small_step(section: Section, data: Beton, store: Path, compiled: str) -> dict[str, Any]:
    """Of a student at 32 px on two crops that are there already: what launching costs, and whether compiling helps."""
    device, images = section.device, section.size(4, 256, 256)
    config = replace(
        _config(section, data, store, section.data / "run", SMALL, 32, "auto", compiled),
        student=StudentConfig(SMALL, 32, small_images=True),
        objective=ObjectiveConfig("embedding"),
        pairing=PairingConfig("same", 2),
    )
    trainer = Trainer(config, TargetSpace(384, 0, True), 1000, device)
    crops = torch.randn(images, 2, 3, 32, 32, device=device)
    target = EmbeddingTarget(F.normalize(torch.randn(images, 2, 384, device=device), dim=-1))
    weights = torch.ones(2, 2, device=device)
    number = count()
    seconds = section.seconds_of(lambda: trainer.step(next(number), [crops], target, weights), 20, 10)
    return {"images_per_second": images / seconds, "ms": seconds * 1e3}


def _plan(section: Section, data: Beton, store: Path) -> dict[str, Any]:
    """What ``rob train-student`` does before its first line, for the student whose many forms of layers take longest. At toy
    size no step is tried."""
    student, size = section.size(("test_resnet", 32), ("mobilenetv3_small_100", 64), ("mobilenetv3_small_100", 64))
    of_user = TrainConfig(
        data.path, section.data / "planned", StudentConfig(student, size), Cached(store), device=str(section.device)
    )
    start = time.perf_counter()
    plan = make_plan(replace(of_user, epochs=1, loader=LoaderConfig(batch_size=8)) if section.toy else of_user)
    seconds = time.perf_counter() - start
    section.check("a plan is there: seconds", seconds, LONGEST_PLAN)
    step = {"step_ms": plan.trial.seconds * 1e3} if plan.trial else {}
    return {"student": f"{student} at {size} px", "seconds": seconds, **step}


def _live(section: Section, data: Beton, store: Path) -> None:
    """The first loss of a run whose teacher works in every step, beside that of one that reads what it said."""
    student, size = section.size(("test_resnet", 32), ("resnet18", 64), ("resnet18", 64))
    losses = []
    for targets in (Cached(store), Online(_teacher(section), get_recipe(RECIPE), VIEWS)):
        out = section.data / "live"
        shutil.rmtree(out, ignore_errors=True)
        config = _config(section, data, store, out, student, size, "auto")
        train_student(replace(config, targets=targets, epochs=1))
        losses.append(_log(out)[0]["loss"])
    gap = abs(losses[1] / losses[0] - 1)
    section.check("a live teacher: difference of the first loss from that of its cached targets", gap, 1e-2)


def _resume(section: Section, data: Beton, store: Path) -> None:
    """The losses of a run that was stopped in its middle, beside those of one that was not."""
    whole, halves = section.data / "whole", section.data / "halves"
    for folder in (whole, halves):
        shutil.rmtree(folder, ignore_errors=True)
    student, size = section.size(("test_resnet", 32), ("resnet18", 64), ("resnet18", 64))
    config = _config(section, data, store, whole, student, size, "auto")
    train_student(config)
    steps = len(_log(whole))

    def stop(line: dict[str, Any], total: int) -> None:
        if line["step"] == steps // 2:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train_student(replace(config, out=halves), TrainProgress(log=stop))
    train_student(replace(config, out=halves))
    pairs = zip(_log(whole), _log(halves), strict=True)
    gap = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)
    section.figures["resume_gap"] = gap
    section.check("stopped and resumed: largest difference of a loss", gap, 1e-3)
