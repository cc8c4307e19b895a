"""Where the host waits for the device in a step of training: file and line, by torch's own hook on CUDA."""

import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from rob.benchmarks.gpu_check.section import Section
from rob.common.views.recipes import get_recipe
from rob.student_train.config import ObjectiveConfig, OptimiserConfig, PairingChoice
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import OBJECTIVES
from rob.student_train.student_config import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.dense import Placement, TargetWithPatches
from rob.student_train.targets.pairing import choose_pairing, plan_views
from rob.student_train.targets.space import PatchSpace, TargetSpace
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer

ROOT = Path(__file__).parents[2]
GRID = {"patch": 2, "ibot": 8}
"""Patches a side of a target; iBOT's are the student's own."""


def run(section: Section) -> None:
    for name in OBJECTIVES:
        section.attempt(name, lambda name=name: _step(section, name))


@contextmanager
def waits(device: torch.device):
    """Yields a counter of the places in rob where the host waited: (file:line) -> times. Empty without CUDA."""
    found: Counter[str] = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "called a synchronizing" not in str(message):  # the mode itself warns once that it does not see everything
            return
        stack = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and f.filename != __file__]
        found[f"{Path(stack[-1].filename).relative_to(ROOT)}:{stack[-1].lineno}" if stack else filename] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _step(section: Section, name: str) -> None:
    """The third step of an objective, as training does it."""
    device = section.device
    images, k, d, size = section.size((4, 12, 16, 32), (32, 1024, 128, 64), (32, 1024, 128, 64))
    recipe = replace(get_recipe("dino"), num_local=2)
    prototypes = normalize(torch.randn(k, d, device=device), dim=1)
    space = TargetSpace(d, k, has_embedding=True, teacher_temp=0.05, prototypes=prototypes)
    student = "test_resnet" if section.toy else "resnet18"
    if name == "patch":
        space = replace(space, patches=PatchSpace("grid", GRID[name], d))
    elif name == "ibot":
        student = "test_vit" if section.toy else "vit_tiny_patch16_224"
        space = replace(space, patches=PatchSpace("embedding", GRID[name], d, k))
    pairing = choose_pairing(name, recipe, 2, PairingChoice("same", num_local=2) if space.patches else None)
    config = TrainConfig(
        Path("data.beton"),
        Path("run"),
        StudentConfig(student, size, small_images=True),
        Cached(Path("targets.zarr")),
        ObjectiveConfig(
            name,
            hidden_dim=32,
            queue=64 if name in ("moco", "disco", "seed") else None,
            patch_from_region=True if name == "patch" else None,
        ),
        pairing,
        OptimiserConfig(lr=1e-3, warmup_epochs=0),
        epochs=10,
        average=0.99,
    )
    if name == "swav":
        config = replace(config, objective=ObjectiveConfig(name, hidden_dim=32, sinkhorn="batch"))
    trainer = Trainer(config, space, 100, device, num_images=10_000)
    plan = plan_views(pairing, 2, 0)
    pair_weights = plan.pair_weights.to(device)
    crops = [torch.randn(images, len(plan.globals), 3, size, size, device=device)]
    if plan.locals:
        crops.append(torch.randn(images, len(plan.locals), 3, size // 2, size // 2, device=device))
    rows = normalize(torch.randn(images, len(plan.targets), d, device=device), dim=2)
    target = EmbeddingTarget(rows, prototypes)
    if space.patches:
        tokens = normalize(torch.randn(images, len(plan.targets) * GRID[name] ** 2, d, device=device), dim=2)
        sides = np.full(images, size)
        placement = Placement(np.arange(images), sides, sides, plan, recipe, 0)
        target = TargetWithPatches(target, EmbeddingTarget(tokens, prototypes), placement)
    for step in range(2):
        trainer.step(step, crops, target, pair_weights)
    section.wait()
    with waits(device) as found:
        health, _ = trainer.step(2, crops, target, pair_weights)
    section.check(f"{name}: the loss is a number", float(not health.isfinite().all()), 0.0)
    places = ", ".join(f"{place} ({times})" for place, times in found.most_common(12))
    section.rows.append({"objective": name, "waits": sum(found.values()), "where": places})
