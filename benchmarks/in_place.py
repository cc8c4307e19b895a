"""A detector whose backbone was trained in place without labels against the same detector from random weights: box AP on BCCD.

    python -m rob.benchmarks.in_place runs/in_place --data ../shared/data [--seeds 1]

The detector is torchvision's own (Faster R-CNN on MobileNetV3-Large with a pyramid), built by ``detector`` below as a user's
code would be: ``rob train-student --student rob.benchmarks.in_place:detector --student-features backbone.body`` trains it in
place on 205 photographs of blood cells and writes the whole network's state dict, which ``load_state_dict(strict=True)`` takes.
Then both, that one and the random one, learn boxes in as many steps. Images are small and schedules short, for a CPU: ranks, not
records.

What is done is not done again: killed, or called with more seeds, the script goes on.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_fpn

from rob.benchmarks.dense import CACHING, STAND_IN, cached, trained
from rob.benchmarks.report import Report
from rob.common.files import replacing
from rob.common.run import seed_everything
from rob.student_train.evaluate.config import DetectConfig
from rob.student_train.evaluate.detection.data import open_detection
from rob.student_train.evaluate.detection.detect import DetectProgress, find, fit
from rob.student_train.evaluate.detection.score import average_precision

SIDE = 240
"""Shorter side of the detector's images, as they are stored."""
TRAINING = (
    "--student-features backbone.body --image-size 96 --epochs 96 --batch-size 16 --lr 0.032 --objective embedding"
)
EPOCHS, BATCH_SIZE, LR = 4, 4, 5e-4


def detector() -> nn.Module:
    """Three kinds of cells and the background; random weights."""
    return fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=SIDE, max_size=2 * SIDE
    )


def measured(out: Path, bccd: Path, weights: Path | None, seed: int) -> float:
    """Box AP in percent after the schedule, from ``weights`` or from random ones."""
    out.mkdir(parents=True, exist_ok=True)
    if not (result := out / "result.json").exists():
        train = open_detection(bccd, "train")
        test = open_detection(bccd, "test").with_classes_of(train)
        seed_everything(seed)
        model = detector()
        assert isinstance(model, FasterRCNN)
        if weights is not None:
            model.load_state_dict(load_file(weights), strict=True)
        config = DetectConfig(out, bccd, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LR, seed=seed, device="cpu")
        cpu, progress = (
            torch.device("cpu"),
            DetectProgress(train=lambda done, total, text: print(done, total, text, flush=True)),
        )
        fit(model, train, False, config, cpu, out / "checkpoint.pt", {"seed": seed, "weights": str(weights)}, progress)
        found = average_precision(test.to_coco(), find(model, test, False, cpu, progress))
        with replacing(result) as file:
            file.write(json.dumps({"ap": found.ap or 0.0, "ap50": found.ap50 or 0.0}).encode())
    return float(json.loads(result.read_text())["ap"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder with bccd.tar.xz")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    out: Path = arguments.out
    bccd, _, packed, store = cached(arguments.data, out)
    found: dict[str, list[float]] = {"random weights": [], "trained in place": []}
    for seed in range(arguments.seeds):
        run = out / f"student-{seed}"
        trained(run, packed, store, seed, "--student", "rob.benchmarks.in_place:detector", *TRAINING.split())
        weights = run / "student.safetensors"
        found["trained in place"].append(measured(out / f"trained-{seed}", bccd, weights, seed))
        found["random weights"].append(measured(out / f"random-{seed}", bccd, None, seed))
    rows: list[dict[str, Any]] = [
        {
            "detector": name,
            "box_ap": mean(values),
            "box_ap_deviation": stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
        for name, values in found.items()
    ]
    schedule = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "lr": LR, "side": SIDE}
    work = {"teacher": STAND_IN, "caching": CACHING, "training": TRAINING, "schedule": schedule}
    report = Report.of("in_place", torch.device("cpu"), work, rows, {})
    report.show()
    print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
