"""A student's step on a CPU, with and without what is done for it beside the network: milliseconds.

    python benchmarks/cpu_step.py [--steps 60]

Both sides make the same steps by turns, from the same weights: ``plain`` as torch makes them by itself (AdamW tensor by tensor,
``clip_grad_norm_`` over ``model.parameters()``, ``torch.manual_seed``), ``ours`` with ``build_optimiser``'s AdamW in one kernel,
``clip_gradients`` and ``seed_step``. Their losses have to be the same, in the first steps: later ones part by rounding.
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rob.benchmarks.report import Report, parts
from rob.common.heads import ProjectionHead
from rob.common.heap import keep_freed_memory
from rob.common.run import seed_step
from rob.student_train.config import OptimiserConfig
from rob.student_train.optimiser import build_optimiser, clip_gradients
from rob.student_train.students import StudentConfig, build_student

STUDENTS = ("test_vit", "mobilenetv3_small_050", "mobilenetv2_050", "resnet18")
IMAGES, SIZE, DIM, LIMIT, WARM_UP = 16, 64, 1280, 3.0, 5


class Side:
    """A student with its head, and how its steps are made."""

    def __init__(self, model: nn.Module, ours: bool) -> None:
        self.model, self.ours = model.train(), ours
        self.optimiser = build_optimiser(model, OptimiserConfig(lr=1e-3), IMAGES, fused=ours)
        self.parameters = list(model.parameters())

    def step(self, number: int, images: Tensor, wanted: Tensor) -> tuple[float, float]:
        """Its seconds, and the loss."""
        start = time.perf_counter()
        if self.ours:
            seed_step(0, 0, number)
        else:
            torch.manual_seed(number)
        loss = (2 - 2 * F.cosine_similarity(self.model(images), wanted)).mean()
        self.optimiser.zero_grad()
        loss.backward()
        if self.ours:
            clip_gradients(self.parameters, LIMIT)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), LIMIT)
        self.optimiser.step()
        return time.perf_counter() - start, loss.item()


def build(name: str) -> nn.Module:
    backbone = build_student(StudentConfig(name, SIZE))
    features: int = backbone.num_features  # type: ignore[assignment]
    return nn.Sequential(backbone, ProjectionHead(features, 2048, DIM, 2, "relu", norm=True))


def run(steps: int) -> Report:
    rows, ratios = [], {}
    for name in parts(STUDENTS):
        torch.manual_seed(0)
        model = build(name)
        sides = {"plain": Side(deepcopy(model), ours=False), "ours": Side(model, ours=True)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        data = torch.Generator().manual_seed(1)
        for number in range(WARM_UP + steps):
            images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=data)
            wanted = torch.randn(IMAGES, DIM, generator=data)
            found = {side: how.step(number, images, wanted) for side, how in sides.items()}
            first, second = (loss for _, loss in found.values())
            assert number > WARM_UP or abs(first - second) < 1e-3, f"{name}, step {number}: {first} and {second}"
            if number >= WARM_UP:
                for side, (taken, _) in found.items():
                    seconds[side].append(taken)
        rows += [{"student": name, "side": side, "ms": 1e3 * median(taken)} for side, taken in seconds.items()]
        ratios[name] = rows[-2]["ms"] / rows[-1]["ms"]
    work = {"images": IMAGES, "image_size": SIZE, "steps": steps, "threads": torch.get_num_threads()}
    return Report.of("cpu_step", torch.device("cpu"), work, rows, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    report = run(options.steps)
    report.show()
    print(report.write(options.report))


if __name__ == "__main__":
    main()
