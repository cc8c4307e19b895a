"""Which objective, targets, pairing and head? k-NN and linear accuracy on real images, over seeds, at equal work of the student.

    python -m rob.benchmarks.ablation --data TRAIN.beton --test TEST.beton --out runs/ablation --teacher teacher.safetensors
        [--store targets.zarr] [--students cnn,vit] [--seeds 3] [--epochs 6] [--rows dino-same,...] [--jobs 8] [--time-limit 200]

One teacher is cached once, and every run reads that store. In every row the student sees the same recipe's views in the same
number of steps: two global crops an image and ``--num-local`` local ones of half their side, or, where a method has global crops
alone (DisCo), as many more of those as have the pixels of the local ones. What other networks pass besides (a copy's keys) is
said in the row. Rows are in the order of their weight, seeds outermost: whatever time there is, the first rows are done. Each run
is a process of its own and leaves its ``result.json``; killed, stopped by ``--time-limit``, or called with more rows, seeds or
students, the benchmark goes on.
"""

import argparse
import json
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from pathlib import Path
from statistics import mean, stdev
from time import monotonic, perf_counter
from typing import Any

import torch

from rob.benchmarks.ablation_rows import ROWS, STUDENTS, Row, kind_of
from rob.benchmarks.kept import keep_settings
from rob.benchmarks.report import Report
from rob.common.cores import usable_cores
from rob.common.errors import MisuseError, unknown_name
from rob.common.exported import described_in, read_metadata
from rob.common.files import replacing
from rob.common.images.beton import Beton
from rob.common.run import pick_device
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.evaluate.knn import knn
from rob.student_train.evaluate.linear import LinearConfig, linear
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.students import StudentConfig
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig, load_teacher

IMAGE_SIZE, LOCAL_SIZE = 32, 16
"""Pixels a side of the student's global and local crops."""
MEASURES = ("knn_top1", "linear_top1")
PRELOADED = ["rob.benchmarks.ablation_rows", "rob.student_train.train", "rob.student_train.evaluate.linear"]
"""What takes long to import, once for all runs."""


@dataclass(frozen=True)
class AblationConfig:
    """``teacher`` None: the store is there already. ``store`` None: in ``out``. ``prototypes`` are fitted where the teacher has
    none. ``workers`` are loader threads of a run; 0: the cores, divided by ``jobs``."""

    train: Path
    test: Path
    out: Path
    teacher: TeacherConfig | None = None
    store: Path | None = None
    students: tuple[str, ...] = ("cnn", "vit")
    """Names of ``STUDENTS`` or timm's, each with ``:bf16`` or nothing behind it."""
    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 6
    batch_size: int = 128
    views: int = 4
    num_local: int = 4
    recipe: str = "sslight"
    prototypes: int = 512
    teacher_size: int | None = None
    teacher_temp: float | None = None
    """Of all objectives over prototypes; None: the store's own."""
    linear_epochs: int = 100
    jobs: int = 1
    workers: int = 0
    time_limit: float | None = None
    device: str = "auto"

    @property
    def threads(self) -> int:
        """Of one run."""
        return self.workers or max(1, usable_cores() // self.jobs)

    @property
    def store_path(self) -> Path:
        return self.store or self.out / "targets.zarr"


@dataclass(frozen=True)
class Job:
    """One run: a student and a row under a seed."""

    student: str
    row: Row
    seed: int

    def folder(self, out: Path) -> Path:
        return out / self.student.replace(":", "_") / self.row.name / str(self.seed)


def run(config: AblationConfig) -> Report:
    """Do what is not done yet, and report what is there. FailureError is a run's own: the others go on."""
    started = monotonic()
    if unknown := [name for name in config.rows if name not in ROWS]:
        raise unknown_name("row", unknown[0], ROWS)
    keep_settings(config.out, settings(config))
    cached_store(config)
    jobs = list(all_jobs(config))
    todo = [job for job in jobs if not (job.folder(config.out) / "result.json").exists()]
    failed = do_all(config, todo, started)
    report = table(config, jobs)
    left = len([job for job in todo if not (job.folder(config.out) / "result.json").exists()])
    print(
        f"{len(jobs) - left} of {len(jobs)} runs are done, {failed} failed, {monotonic() - started:.0f} s", flush=True
    )
    return report


def settings(config: AblationConfig) -> dict[str, Any]:
    """What all results in ``config.out`` depend on."""
    names = ("epochs", "batch_size", "views", "num_local", "recipe", "prototypes", "teacher_size", "teacher_temp")
    return {
        "train": Beton(config.train).manifest.fingerprint,
        "test": Beton(config.test).manifest.fingerprint,
        "device": pick_device(config.device).type,
        **{name: asdict(config)[name] for name in (*names, "linear_epochs")},
        "teacher": None if config.teacher is None else str(config.teacher.checkpoint or config.teacher.name),
    }


def cached_store(config: AblationConfig) -> TargetStore:
    """The targets of every row, made if they are not there. MisuseError: neither a store nor a teacher."""
    path = config.store_path
    if not (path / "zarr.json").exists() and config.teacher is None:
        raise MisuseError(f"{path} is no store yet, and there is no teacher to make it: give --teacher")
    if config.teacher is not None:
        teacher = load_teacher(config.teacher)
        cache_teacher(
            CacheConfig(
                config.train, path, config.teacher, get_recipe(config.recipe), config.views, encoding=Encoding("embedding"),
                view_size=config.teacher_size or teacher.view_size, device=config.device,
                prototypes=0 if teacher.num_prototypes else config.prototypes,
                loader=LoaderConfig(batch_size=256, workers=config.workers),
            )
        )  # fmt: skip
    return TargetStore.open(path)


def all_jobs(config: AblationConfig) -> Iterator[Job]:
    """In the order in which they are done."""
    for seed in config.seeds:
        for name in config.rows:
            for student in config.students:
                yield Job(student, ROWS[name], seed)


# ==== runs, each a process ====


def do_all(config: AblationConfig, todo: list[Job], started: float) -> int:
    """``config.jobs`` at a time, none begun after the time limit; how many failed.

    Processes are forked off a server that has imported everything and has not touched a GPU: they start in a moment.
    """
    context = starting()
    waiting, running, failed = deque(todo), {}, 0
    try:
        while waiting or running:
            if config.time_limit is not None and monotonic() - started > config.time_limit:
                waiting.clear()
            while waiting and len(running) < config.jobs:
                job = waiting.popleft()
                process = context.Process(target=one_run, args=(config, job))
                process.start()
                running[process.sentinel] = (process, job)
            for sentinel in connection.wait(list(running), timeout=1.0):
                process, job = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed += 1
                    print(f"failed: {job.student} {job.row.name} {job.seed}", file=sys.stderr, flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
    return failed


def starting() -> Any:
    """How processes are started: from a server, or anew where what it imported has touched CUDA, which a fork then cannot use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    probe = context.Process(target=_refuse_bad_fork)
    probe.start()
    probe.join()
    return multiprocessing.get_context("spawn") if probe.exitcode else context


def _refuse_bad_fork() -> None:
    sys.exit(torch.cuda._is_in_bad_fork())


def one_run(config: AblationConfig, job: Job) -> None:
    """Train, measure, and leave ``result.json``."""
    torch.set_num_threads(config.threads)
    folder, device = job.folder(config.out), pick_device(config.device)
    start = perf_counter()
    result: dict[str, Any] = {"student": job.student, "row": job.row.name, "seed": job.seed}
    if job.row.objective is None:
        network = FrozenNetwork.random_student(student_config(job.student), job.seed, device)
    else:
        trained = train_student(training(config, job))
        network = FrozenNetwork.student(trained.weights, device)
        result |= {"loss": trained.loss, "steps": trained.steps, "images_per_second": trained.images_per_second}
        result |= {"shares": trained.shares}
    result["train_seconds"] = perf_counter() - start
    result |= measured(config, network)
    result["seconds"] = perf_counter() - start
    with replacing(folder / "result.json") as file:
        file.write((json.dumps(result) + "\n").encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    shown = {name: round(value, 2) for name, value in result.items() if isinstance(value, float)}
    print(job.student, job.row.name, job.seed, shown, flush=True)


def student_config(student: str) -> StudentConfig:
    name = student.partition(":")[0]
    # MSN's drop of patches is left out: the student is to have the same work in every row.
    return StudentConfig(STUDENTS.get(name, name), image_size=IMAGE_SIZE, small_images=True, patch_drop=0.0)


def training(config: AblationConfig, job: Job) -> TrainConfig:
    """The settings of a run."""
    name, _, precision = job.student.partition(":")
    row, store = job.row, TargetStore.open(config.store_path)
    kind = kind_of(STUDENTS.get(name, name))
    warmup = min(1.0, config.epochs / 4)
    return TrainConfig(
        data=config.train,
        out=job.folder(config.out),
        targets=row.targets(config.store_path, get_recipe(config.recipe), store.manifest.num_prototypes),
        student=student_config(job.student),
        precision=precision or "fp32",
        objective=row.fitted_objective(kind, config.teacher_temp),
        pairing=row.pairing(config.num_local, IMAGE_SIZE, LOCAL_SIZE),
        optimiser=replace(row.optimiser(kind), warmup_epochs=warmup),
        epochs=config.epochs,
        local_size=LOCAL_SIZE,
        seed=job.seed,
        device=config.device,
        loader=LoaderConfig(batch_size=config.batch_size, workers=config.threads),
        checkpoint_every=config.epochs,
        log_every=50,
    )


def measured(config: AblationConfig, network: FrozenNetwork) -> dict[str, float]:
    loader = LoaderConfig(batch_size=500, workers=config.threads)
    train, test = (network.features(path, loader).to(network.device) for path in (config.train, config.test))
    head = LinearConfig(epochs=config.linear_epochs)
    return {"knn_top1": knn(train, test).top1, "linear_top1": linear(train, test, head).top1}


# ==== the table ====


def table(config: AblationConfig, jobs: list[Job]) -> Report:
    """A row for each student and setting of which there are results, over the seeds; the runs themselves go to ``runs.jsonl``."""
    device = pick_device(config.device)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs:
        path = job.folder(config.out) / "result.json"
        if path.exists():
            results.setdefault((job.student, job.row.name), []).append(json.loads(path.read_text()))
    rows = []
    for student in config.students:
        for name in config.rows:
            found = results.get((student, name))
            if not found:
                continue
            row: dict[str, Any] = {"student": student, "setting": ROWS[name].title, "seeds": len(found)}
            for measure in MEASURES:
                values = [result[measure] for result in found]
                row[measure] = mean(values)
                if len(values) > 1:
                    row[f"{measure}_deviation"] = stdev(values)
            row["train_seconds"] = mean(result["train_seconds"] for result in found)
            rows.append(row | {"student_views": ROWS[name].seen(config.num_local), "besides": ROWS[name].besides})
    rows += of_the_teacher(config)
    with replacing(config.out / "runs.jsonl") as file:
        file.write("".join(json.dumps(run) + "\n" for found in results.values() for run in found).encode())
    manifest = TargetStore.open(config.store_path).manifest
    work = {
        "images": Beton(config.train).num_images,
        "test_images": Beton(config.test).num_images,
        "store": {
            name: getattr(manifest, name) for name in ("teacher", "weights_hash", "head", "num_prototypes", "view_size")
        },
        "store_temperature": manifest.teacher_temp,
        **settings(config),
        "jobs": config.jobs,
        "image_size": IMAGE_SIZE,
        "local_size": LOCAL_SIZE,
        "students": {name: STUDENTS.get(name.partition(":")[0], name) for name in config.students},
    }
    return Report.of("ablation", device, work, rows, {})


def of_the_teacher(config: AblationConfig) -> list[dict[str, Any]]:
    """What there is to reach, measured once."""
    if config.teacher is None:
        return []
    path, device = config.out / "teacher.json", pick_device(config.device)
    if not path.exists():
        teacher = load_teacher(config.teacher).to(device)
        network = FrozenNetwork.teacher(teacher, config.teacher_size or teacher.view_size, device)
        with replacing(path) as file:
            file.write(json.dumps(measured(config, network)).encode())
    return [{"student": "(teacher)", "setting": config.teacher.name, **json.loads(path.read_text())}]


def teacher_of(spec: str) -> TeacherConfig:
    """A file that ``rob`` wrote, a teacher's name, or NAME=FILE."""
    name, _, file = spec.partition("=")
    if file:
        return TeacherConfig(name, Path(file))
    info = described_in(read_metadata(Path(spec)), Path(spec))
    return TeacherConfig(spec) if info is None else TeacherConfig(info.name, Path(spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--teacher", help="a file of rob export-teacher or rob train-student, a name, or NAME=FILE")
    parser.add_argument("--store", type=Path, help="made if absent")
    parser.add_argument("--students", default="cnn,vit")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=3)
    for name in ("epochs", "batch_size", "views", "num_local", "prototypes", "linear_epochs", "jobs", "workers"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(AblationConfig, name))
    parser.add_argument("--teacher-size", type=int)
    parser.add_argument("--teacher-temp", type=float)
    parser.add_argument("--recipe", default=AblationConfig.recipe)
    parser.add_argument("--time-limit", type=float, help="seconds after which no further run begins")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--report", type=Path, help="JSON to write; default benchmarks/results/ablation_DEVICE_DATE.json"
    )
    given = vars(parser.parse_args())
    path, train = given.pop("report"), given.pop("data")
    given |= {name: tuple(given[name].split(",")) for name in ("students", "rows")}
    given |= {"seeds": tuple(range(given["seeds"])), "teacher": given["teacher"] and teacher_of(given["teacher"])}
    try:
        report = run(AblationConfig(train=train, **given))
    except MisuseError as error:
        sys.exit(f"error: {error}")
    report.show()
    print(report.write(path))


if __name__ == "__main__":
    main()
