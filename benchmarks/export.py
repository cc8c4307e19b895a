"""What becomes of four students in each format: size, agreement with torch, k-NN, latency.

    python benchmarks/export.py TRAIN.beton TEST.beton runs/export [--students resnet18 vit_tiny_patch16_224 ...]
        [--to onnx torch executorch coreml litert] [--image-size 64] [--budget 5m] [--images 2000] [--result FILE.json]

Each student is first trained on TRAIN from the cached embeddings of the demo's stand-in teacher, for ``--budget``, unless
``runs/export/STUDENT`` has weights already: the k-NN of a network that learned nothing would not tell what int8 costs. Then it is
exported as ``rob export`` does, int8 calibrated on 256 images of TEST and everything compared with torch on ``--images`` of
TEST. k-NN is top-1 among these images, each by its 10 nearest others; latency is from the bytes of one image to its features, on
one thread of the CPU, in the file's own runtime, and of "torch, eager" in torch. What does not convert, agree or install is a row
that says why.

Not all formats install side by side: run it again with the Python of another environment and the same OUT. Each row is kept in
``OUT/rows`` as it is done, and only those that lacked a package, or were not tried, are made; the report holds all of them.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rob.benchmarks.kept import keep_settings
from rob.benchmarks.report import Report
from rob.benchmarks.standin import TEACHER
from rob.common.errors import FailureError, MisuseError
from rob.common.files import replacing
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.timing import median_ms
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.config import PairingChoice
from rob.student_train.export.config import CALIBRATIONS, WITH_INT8, ExportConfig
from rob.student_train.export.export import export
from rob.student_train.export.exported_file import ExportedFile
from rob.student_train.export.graph import run_module
from rob.student_train.export.input_form import WithInput
from rob.student_train.export.subject import open_subject
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher

STUDENTS = ("resnet18", "mobilenetv3_small_100", "efficientnet_b0", "vit_tiny_patch16_224")
TO = ("onnx", "torch", "executorch", "coreml", "litert")
CALIBRATION = 256
LEAST = 1e-6
"""The agreement at which a file is kept here: a table shows the bad ones, too."""


@dataclass(frozen=True)
class ExportBenchConfig:
    train: Path
    test: Path
    out: Path
    students: tuple[str, ...] = STUDENTS
    to: tuple[str, ...] = TO
    image_size: int = 64
    budget: str = "5m"
    images: int = 2000
    workers: int = 1


def run(config: ExportBenchConfig) -> Report:
    loader = LoaderConfig(batch_size=32, workers=config.workers)
    work = {"images": config.images, "image_size": config.image_size, "calibration": CALIBRATION}
    torch.set_num_threads(1)
    images = {name: Beton(path).manifest.fingerprint for name, path in (("train", config.train), ("test", config.test))}
    keep_settings(config.out, {**work, **images, "budget": config.budget})
    for student in config.students:
        folder = config.out / student
        if not (folder / "student.safetensors").exists():
            train(config, student, folder, loader)
        for row in missing(config, folder, loader):
            print(row, flush=True)
            file = rows_of(config.out) / f"{student}, {row['file']}.json"
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as open_file:
                open_file.write(json.dumps({"student": student, **row}).encode())
    labels = ["torch, eager", *(label for name in TO for label in sorted(label for label, *_ in files((name,))))]
    rows = [json.loads(file.read_text()) for file in rows_of(config.out).glob("*.json")]
    rows.sort(key=lambda row: (row["student"], labels.index(row["file"])))
    return Report.of("export", torch.device("cpu"), work, rows, {})


def rows_of(out: Path) -> Path:
    return out / "rows"


def files(formats: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """What is made: its label, its format, and how it is calibrated, None for float, which comes with the int8 before it."""
    for name in formats:
        ways = CALIBRATIONS if name == "onnx" else CALIBRATIONS[:1] if name in WITH_INT8 else ()
        for way in ways:
            yield f"{name} int8, {way}" if len(ways) > 1 else f"{name} int8", name, way
        yield name, name, None


def train(config: ExportBenchConfig, student: str, folder: Path, loader: LoaderConfig) -> None:
    """The student of the table: minutes of training, enough for features that tell classes apart."""
    store, recipe = config.out / "targets.zarr", get_recipe("weak")
    cache_teacher(
        CacheConfig(
            config.train,
            store,
            TEACHER,
            recipe=recipe,
            views=2,
            view_size=config.image_size,
            encoding=Encoding("embedding"),
            loader=loader,
        )
    )
    train_student(
        TrainConfig(
            config.train,
            folder,
            StudentConfig(student, config.image_size, small_images=False),
            Cached(store),
            ObjectiveConfig("embedding"),
            pairing=PairingChoice(num_local=0),
            budget=config.budget,
            loader=loader,
        )
    )


def missing(config: ExportBenchConfig, folder: Path, loader: LoaderConfig) -> Iterator[dict[str, Any]]:
    """The rows of one student that are not kept yet: torch, and each format's files, as far as this environment has it."""

    def kept(label: str) -> bool:
        file = rows_of(config.out) / f"{folder.name}, {label}.json"
        return file.exists() and not json.loads(file.read_text()).get("lacks")

    if not kept("torch, eager"):
        yield {"file": "torch, eager", "ms": eager_ms(folder)}
    for label, name, calibrate in files(config.to):
        if kept(label):
            continue
        try:
            done = export(
                ExportConfig(
                    folder,
                    (name,),
                    data=config.test,
                    out=folder / name,
                    int8=calibrate is not None,
                    calibrate=calibrate or CALIBRATIONS[0],
                    images=config.images,
                    calibration=CALIBRATION,
                    min_agreement=LEAST,
                    overwrite=True,
                    loader=loader,
                )
            )
        except MisuseError as error:
            yield {"file": label, "reason": str(error), "lacks": True}
        except FailureError as error:
            yield {"file": label, "reason": str(error)}
        else:
            yield {"file": label, **figures(done[-1])}
            if calibrate and not kept(name):
                yield {"file": name, **figures(done[0])}


def eager_ms(folder: Path) -> float:
    """Of the network that the files are of, on what they take: the bytes of an image, on one thread."""
    subject = open_subject(folder, None)
    size = subject.info.image_size
    module = run_module(WithInput(subject.network, "uint8", size, subject.info.mean, subject.info.std).eval())
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    return median_ms(lambda: module(image))


def figures(entry: ExportedFile) -> dict[str, Any]:
    found: dict[str, Any] = {"MB": entry.bytes / 1e6, "int8_share": entry.int8_share, "ms": entry.latency_ms}
    found["runtime"] = entry.runtime
    if entry.agreement is None:
        return {**found, "reason": "converted; not run: it needs a Mac"}
    agreement = entry.agreement
    found |= {"lowest_cosine": agreement.lowest_cosine, "mean_cosine": agreement.mean_cosine}
    return {**found, "neighbours": agreement.neighbours, "knn": agreement.knn, "knn_of_torch": agreement.knn_torch}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--to", nargs="+", default=TO)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--result", type=Path, help="where the report goes; default benchmarks/results/export_DEVICE_DATE.json"
    )
    given: dict[str, Any] = vars(parser.parse_args())
    several: dict[str, Any] = {name: tuple(given.pop(name)) for name in ("students", "to")}
    result: Path | None = given.pop("result")
    report = run(ExportBenchConfig(**given, **several))
    report.show()
    print(f"written to {report.write(result)}")
