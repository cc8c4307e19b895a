"""A first user's run: plain commands on small sets of real photographs, and what makes such a run fail.

    python benchmarks/first_run.py runs/first --data ../shared/data [--only signdigits cells cifar10] [--students resnet18 ...]
        [--causes] [--view-size 96] [--caching "--patches none"]

For each data set and student: ``rob pack``, ``rob cache-teacher`` with the stand-in, ``rob train-student --image-size 64`` with
no option more, and ``rob eval knn`` of pixels, the random start, the student, and the teacher at the size of its views.
``--caching "--patches none --recipe dino"`` is what was once the default of ``rob cache-teacher``.
``cells`` are BCCD's, cut out by their boxes, at most 400 of a class. ``--causes`` is another table, one row a cause:
MobileNetV3-Small on ``signdigits`` in 10 passes over the images, each row with one thing as it was in a run that ended below its
random start.

A command that is done is not done again: killed, or called with more, the script goes on. Minutes are those of the training log.
"""

import argparse
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from rob.benchmarks.processes import rob
from rob.benchmarks.report import Report
from rob.common.run import pick_device

STAND_IN = "efficientnet_lite0"
STUDENTS = ("mobilenetv3_small_100", "mobilenetv2_050", "resnet18", "vit_tiny_patch16_224")
DATA_SETS = ("signdigits", "cells", "cifar10")
IMAGE_SIZE = 64
MOST_OF_A_CLASS = {"trainval": 400, "test": 100}
ABOVE_RANDOM, BELOW_TEACHER, MINUTES = 10.0, 5.0, 20.0
"""What a first run has to reach, in points of k-NN and minutes of training."""
CAUSES = {
    "batch 64, as many images: 250 steps": "--epochs 10 --batch-size 64 --lr 0.004",
    "batch 32: 510 steps, the rate twice as high": "--epochs 10 --batch-size 32 --lr 0.016",
    "batch 16: 1,030 steps": "--epochs 10 --batch-size 16 --lr 0.032",
    "batch 16, the published rate": "--epochs 10 --batch-size 16 --lr 0.0005",
    "batch 16, four times the images": "--epochs 40 --batch-size 16 --lr 0.032",
    "batch 32, targets centred": "--epochs 10 --batch-size 32 --lr 0.016 --centre-targets calibration",
    "batch 16, no BatchNorm in the head": "--epochs 10 --batch-size 16 --lr 0.032 --no-head-norm",
    "batch 16, stem for small images": "--epochs 10 --batch-size 16 --lr 0.032 --small-images",
    "batch 16, prototypes fitted": "--epochs 10 --batch-size 16 --lr 0.032 --targets PROTOTYPES",
    "batch 16, prototypes, a third of their temperature": (
        "--epochs 10 --batch-size 16 --lr 0.032 --targets PROTOTYPES --teacher-temp 0.02"
    ),
}
"""Name -> options; without --small-images in them, with timm's own stem."""


@dataclass(frozen=True)
class Packed:
    """A data set as files: images to train on and to test on."""

    train: Path
    test: Path


def prepare(name: str, data: Path, out: Path) -> Packed:
    """Unpack, cut out and pack what is not there yet."""
    packed = Packed(out / f"{name}.train.beton", out / f"{name}.test.beton")
    if not packed.test.exists():
        archive = {"signdigits": "signdigits", "cells": "bccd", "cifar10": "cifar10-jpeg"}[name]
        folder = out / name
        with tarfile.open(data / f"{archive}.tar.xz") as file:
            file.extractall(folder, filter="data")
        root = {"signdigits": folder / "signdigits", "cells": folder / "cells", "cifar10": folder}[name]
        if name == "cells":
            cut_cells(folder / "BCCD", root)
        for split, path in (("train", packed.train), ("test", packed.test)):
            limit = ("--limit", 3000 if split == "train" else 1000) if name == "cifar10" else ()
            path.unlink(missing_ok=True)
            rob("pack", root / split, path, *limit)
    return packed


def cut_cells(voc: Path, out: Path) -> None:
    """Each box of an image as an image of its own, in a folder of its class."""
    for part, most in MOST_OF_A_CLASS.items():
        counts: dict[str, int] = {}
        for stem in (voc / "ImageSets" / "Main" / f"{part}.txt").read_text().split():
            image = Image.open(voc / "JPEGImages" / f"{stem}.jpg").convert("RGB")
            for number, box in enumerate(ElementTree.parse(voc / "Annotations" / f"{stem}.xml").iter("object")):
                kind = box.findtext("name", "?")
                corners = [int(box.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax")]
                if counts.get(kind, 0) >= most or min(corners[2] - corners[0], corners[3] - corners[1]) < 8:
                    continue
                counts[kind] = counts.get(kind, 0) + 1
                path = out / ("train" if part == "trainval" else "test") / kind / f"{stem}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((corners[0], corners[1], corners[2], corners[3])).save(path)


def cached(packed: Packed, store: Path, view_size: int | None, *words: object) -> Path:
    """The stand-in's targets; a store that is complete is left as it is."""
    size = ("--view-size", view_size) if view_size else ()
    rob("cache-teacher", packed.train, store, "--teacher", STAND_IN, *size, *words)
    return store


def knn(what: object, packed: Packed, folder: Path, *words: object, name: str = "knn") -> float:
    """k-NN top-1, kept in ``folder``."""
    result = folder / "eval" / f"{name}.json"
    if not result.exists():
        rob("eval", "knn", what, packed.train, "--test", packed.test, "--out", folder, *words)
    return json.loads(result.read_text())["top1"]


def minutes(run: Path) -> float:
    """Of training, by its log, over all the processes that it took."""
    batch = json.loads((run / "config.json").read_text())["loader"]["batch_size"]
    lines, seconds, before = (run / "metrics.jsonl").read_text().splitlines(), 0.0, 0
    for line in map(json.loads, lines):
        seconds += (line["step"] - before) * batch / line["images_per_second"]
        before = line["step"]
    return seconds / 60


def train(run: Path, packed: Packed, store: Path, *words: object) -> dict[str, Any]:
    """A run and what became of it."""
    if not (run / "student.safetensors").exists():
        given = () if "--targets" in words else ("--targets", store)
        rob("train-student", packed.train, *given, "--out", run, "--image-size", IMAGE_SIZE, *words)
    config = json.loads((run / "config.json").read_text())
    return {
        "steps": json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"],
        "batch": config["loader"]["batch_size"],
        "random": knn(run, packed, run, "--init", "random", name="knn-random"),
        "student": knn(run, packed, run),
        "minutes": round(minutes(run), 1),
    }


def first_runs(
    data: Path, out: Path, names: list[str], students: list[str], view_size: int | None, caching: list[str]
) -> list[dict[str, Any]]:
    """A row a data set and student."""
    rows = []
    for name in names:
        packed = prepare(name, data, out)
        kind = "-".join([name, str(view_size or "own"), *(word.strip("-") for word in caching)])
        store = cached(packed, out / f"{kind}.zarr", view_size, *caching)
        size = json.loads((store / "zarr.json").read_text())["attributes"]["view_size"]
        pixels = knn("pixels", packed, out / f"{name}-pixels")
        teacher = knn("teacher", packed, out / f"{name}-teacher-{size}", "--teacher", STAND_IN, "--size", size)
        for student in students:
            found = train(out / f"{kind}-{student}", packed, store, "--student", student)
            worked = found["student"] >= found["random"] + ABOVE_RANDOM and found["student"] >= teacher - BELOW_TEACHER
            rows.append(
                {"data": name, "network": student, "pixels": pixels, **found, "teacher": teacher, "views_px": size}
                | {"worked": "yes" if worked and found["minutes"] <= MINUTES else "no"}
            )
    return rows


def causes(data: Path, out: Path) -> list[dict[str, Any]]:
    """A row a cause."""
    packed, rows = prepare("signdigits", data, out), []
    usual_then = ("--patches", "none", "--recipe", "dino")
    store = cached(packed, out / "signdigits-96.zarr", 96, *usual_then)
    fitted = out / "signdigits-96-prototypes.zarr"
    for name, options in CAUSES.items():
        words = ["--student", "mobilenetv3_small_100", *options.split()]
        if "--small-images" not in words:
            words.append("--no-small-images")
        if "PROTOTYPES" in words:
            words[words.index("PROTOTYPES")] = str(cached(packed, fitted, 96, "--prototypes", 512, *usual_then))
        rows.append({"cause": name, **train(out / f"cause-{name.replace(' ', '-')}", packed, store, *words)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="A first user's run on small sets of real photographs.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the three archives")
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--students", nargs="+", default=list(STUDENTS))
    parser.add_argument("--view-size", type=int, help="of the teacher; default its own")
    parser.add_argument("--caching", default="", help="options of rob cache-teacher, in one string")
    parser.add_argument("--causes", action="store_true", help="the other table: what makes a run fail")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    name, size = "first_run", arguments.view_size
    if arguments.causes:
        name, rows = "first_run_causes", causes(arguments.data, out)
    else:
        rows = first_runs(arguments.data, out, arguments.only, arguments.students, size, arguments.caching.split())
    work = {"teacher": STAND_IN, "image_size": IMAGE_SIZE, "view_size": size, "caching": arguments.caching, "k": 20}
    report = Report.of(name, pick_device("auto"), work, rows, {})
    report.show()
    print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
