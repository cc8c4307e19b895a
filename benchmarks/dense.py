"""Are targets of patches worth their bytes? A student distilled with and without them, segmenting and detecting blood cells.

    python benchmarks/dense.py runs/dense --data ../shared/data [--seeds 3] [--detect-seeds 1]

BCCD (205 images to train on, 72 to test): the masks are ellipses in its boxes, smaller ones over larger. The same student and as
many steps in every row: random weights; ``--objective embedding``; ``--objective patch``. ``rob eval segment`` probes frozen
features, ``rob eval detect`` fine-tunes all of a detector. Images are small and schedules short, for a CPU: ranks, not records.

A command that is done is not done again: killed, or called with more seeds, the script goes on.
"""

import argparse
import json
import tarfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image, ImageDraw

from rob.benchmarks.processes import rob
from rob.benchmarks.report import Report
from rob.student_train.evaluate.detection.data import DetectionData, open_detection

STAND_IN, STUDENT = "efficientnet_lite0", "mobilenetv2_050"
CLASSES = ("background", "RBC", "WBC", "Platelets")
SIZE = 320, 240
"""Of an image and its mask."""
CACHING = "--views 4 --view-size 224 --global-scale 0.1 0.6 --patches grid"
TRAINING = f"--student {STUDENT} --image-size 96 --no-small-images --epochs 24 --batch-size 16 --lr 0.032"
OBJECTIVES = {"embedding": "--objective embedding", "patch": "--objective patch --patch-layer -2"}
PROBE = "--layer -2"
DETECTOR = "--side 240 --channels 64 --epochs 8 --batch-size 4 --lr 0.0005"


def prepare(data: Path, out: Path) -> tuple[Path, Path]:
    """BCCD's folder, and that of images and masks in folders ``train`` and ``test``."""
    bccd, cells = out / "BCCD", out / "cells"
    if not (cells / "done").exists():
        with tarfile.open(data / "bccd.tar.xz") as file:
            file.extractall(out, filter="data")
        for part in ("train", "test"):
            boxed = open_detection(bccd, part)
            for image in boxed.images:
                draw(boxed, image, cells, part)
        (cells / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        (cells / "done").touch()
    return bccd, cells


def cached(data: Path, out: Path) -> tuple[Path, Path, Path, Path]:
    """The same two folders, the photographs to train on as a ``.beton``, and the stand-in's targets of them."""
    out.mkdir(parents=True, exist_ok=True)
    bccd, cells = prepare(data, out)
    packed, store = out / "train.beton", out / "targets.zarr"
    if not packed.exists():
        rob("pack", cells / "images" / "train", packed)
    rob("cache-teacher", packed, store, "--teacher", STAND_IN, *CACHING.split())
    return bccd, cells, packed, store


def trained(run: Path, packed: Path, store: Path, seed: int, *options: str) -> None:
    """A student in the folder ``run``, unless there is one."""
    if not (run / "student.safetensors").exists():
        rob("train-student", packed, "--targets", store, "--out", run, *options, "--seed", seed)


def draw(data: DetectionData, image: dict[str, Any], out: Path, part: str) -> None:
    """One image and its mask."""
    file = data.folder / image["file_name"]
    photograph = Image.open(file).convert("RGB")
    mask = Image.new("L", photograph.size)
    for thing in sorted(data.annotations[image["id"]], key=lambda thing: thing["area"], reverse=True):
        left, top, width, height = thing["bbox"]
        label = CLASSES.index(data.categories[thing["category_id"]])
        ImageDraw.Draw(mask).ellipse((left, top, left + width, top + height), fill=label)
    for kind, picture, how in (
        ("images", photograph, Image.Resampling.BICUBIC),
        ("masks", mask, Image.Resampling.NEAREST),
    ):
        path = out / kind / part / f"{file.stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize(SIZE, how).save(path)


def measured(run: Path, bccd: Path, cells: Path, init: str, seed: int, detect: bool) -> dict[str, float]:
    """mIoU and, if asked for, box AP, of a student or its random start."""
    end = "" if init == "student" else f"-{init}"
    segmented, detected = run / "eval" / f"segment{end}.json", run / "eval" / f"detect{end}.json"
    if not segmented.exists():
        rob(
            "eval",
            "segment",
            run,
            cells / "images/train",
            cells / "images/test",
            "--init",
            init,
            "--seed",
            seed,
            *PROBE.split(),
        )
    if detect and not detected.exists():
        rob("eval", "detect", run, bccd, "--init", init, "--seed", seed, *DETECTOR.split())
    found = {"miou": json.loads(segmented.read_text())["miou"]}
    return found | ({"box_ap": json.loads(detected.read_text())["box"]["ap"]} if detect else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder with bccd.tar.xz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--detect-seeds", type=int, default=1, help="how many of them a detector is trained with")
    arguments = parser.parse_args()
    out: Path = arguments.out
    bccd, cells, packed, store = cached(arguments.data, out)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name, options in OBJECTIVES.items():
            run = out / f"{name}-{seed}"
            trained(run, packed, store, seed, *TRAINING.split(), *options.split())
            detect = seed < arguments.detect_seeds
            found.setdefault(name, []).append(measured(run, bccd, cells, "student", seed, detect))
            if name == "embedding":
                found.setdefault("random", []).append(measured(run, bccd, cells, "random", seed, detect))
    rows: list[dict[str, Any]] = []
    for name in ("random", *OBJECTIVES):
        row: dict[str, Any] = {"student": name}
        for measure in ("miou", "box_ap"):
            values = [one[measure] for one in found[name] if measure in one]
            if values:
                row |= {measure: mean(values), f"{measure}_deviation": stdev(values) if len(values) > 1 else None}
                row[f"{measure}_seeds"] = len(values)
        rows.append(row)
    work = {
        "teacher": STAND_IN,
        "student": STUDENT,
        "caching": CACHING,
        "training": TRAINING,
        "probe": PROBE,
        "detector": DETECTOR,
    }
    report = Report.of("dense", torch.device("cpu"), work, rows, {})
    report.show()
    print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
