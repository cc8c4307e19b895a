"""What it costs on a CPU to give freed memory back: seconds of passes with and without ``common.heap.keep_freed_memory``.

    python benchmarks/heap.py [--rounds 3]

Every pass is in a process of its own, since what a process has kept it keeps; the two sides take turns. Weights are random, from
one seed, and the results of both sides have to be the same numbers. ``system`` is the kernel's share of the CPU's time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor

from rob.benchmarks.report import Report, parts
from rob.common.heap import keep_freed_memory

SIDES = ("given back", "kept")


def teacher(name: str, images: int, size: int) -> Callable[[], Tensor]:
    """A pass of a frozen network over so many images."""
    network = timm.create_model(name, num_classes=0).eval()
    batch = torch.randn(images, 3, size, size)
    return lambda: torch.inference_mode()(network)(batch)


def student(name: str, images: int, size: int) -> Callable[[], Tensor]:
    """A step of training."""
    network = timm.create_model(name, num_classes=0).train()
    optimiser, batch = torch.optim.AdamW(network.parameters()), torch.randn(images, 3, size, size)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = network(batch).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


CASES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "EfficientNet-Lite0, 128 images of 224 px": lambda: teacher("efficientnet_lite0", 128, 224),
    "ResNet-50, 128 images of 224 px": lambda: teacher("resnet50", 128, 224),
    "ViT-S/16, 128 images of 224 px": lambda: teacher("vit_small_patch16_224", 128, 224),
    "training ResNet-18, 32 images of 224 px": lambda: student("resnet18", 32, 224),
    "training MobileNetV3-Small, 32 images of 224 px": lambda: student("mobilenetv3_small_100", 32, 224),
}


def measure(case: str, side: str) -> dict[str, float]:
    """In this process: the second of two passes."""
    if side == "kept" and not keep_freed_memory():
        raise SystemExit("this C library is not glibc: there is nothing to compare")
    torch.manual_seed(0)
    work = CASES[case]()
    work()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    said = work()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    system, own = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    peak = after.ru_maxrss * 1024
    return {
        "seconds": seconds,
        "system": system,
        "own": own,
        "peak_gb": peak / 1e9,
        "sum": said.double().abs().sum().item(),
    }


def run(rounds: int) -> Report:
    rows, ratios = [], {}
    for case in parts(list(CASES)):
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                output = subprocess.check_output([sys.executable, __file__, "--measure", case, side])
                found[side].append(json.loads(output))
        sums = {one["sum"] for many in found.values() for one in many}
        assert len(sums) == 1, f"{case}: the two sides differ, {sums}"
        for side, many in found.items():
            names = ("seconds", "own", "system", "peak_gb")
            rows.append({"work": case, "freed memory is": side, **{n: median(one[n] for one in many) for n in names}})
        ratios[case] = rows[-2]["seconds"] / rows[-1]["seconds"]
    return Report.of("heap", torch.device("cpu"), {"rounds": rounds}, rows, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    report = run(options.rounds)
    report.show()
    print(report.write(options.report))


if __name__ == "__main__":
    main()
