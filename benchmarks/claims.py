"""The papers' claims on real images: k-NN and linear accuracy over seeds, at equal work of the student.

    python -m rob.benchmarks.claims --data TRAIN.beton --test TEST.beton --out runs/claims --teacher teacher.safetensors
        [--students cnn,vit] [--seeds 3] [--epochs 6] [--rows claims,views,dino-same,...] [--jobs 8] [--time-limit 200]

A teacher is cached once for each number of views, encoding and recipe that a row asks for, and every run reads its row's store.
In every row the student sees as many pixels: in a step two global crops an image and ``--num-local`` local ones of half their
side, or, where a method has global crops alone (DisCo), as many more of those as have the pixels of the local ones; the rows of
cached views see one crop a step, in as many times the steps. What other networks pass besides (a copy's keys, a live teacher) is
said in the row. ``--rows`` takes rows and groups: ``claims`` (with labels, without a teacher, SSLight's views), ``views`` (how
many cached ones are enough), ``encodings`` (what a byte saved costs) and ``objectives`` (which, and which pairing and head), each
in the order of its rows' weight, seeds outermost: whatever time there is, the first rows are done. Each run is a process of its
own and leaves its ``result.json``; killed, stopped by ``--time-limit``, or called with more rows, seeds or students, it goes on.

``p`` in the table is McNemar's exact test on the same test images against the row named there, of the seed where it is largest.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from rob.benchmarks.claims_config import ClaimsConfig, Job
from rob.benchmarks.claims_rows import GROUPS, ROWS, STUDENTS, USES_STORE, Row, chosen
from rob.benchmarks.claims_run import IMAGE_SIZE, LOCAL_SIZE, made_of, measured, one_run, tuned
from rob.benchmarks.claims_table import MEASURES, over_seeds
from rob.benchmarks.kept import keep_settings
from rob.benchmarks.processes import do_all
from rob.benchmarks.report import Report
from rob.common.errors import MisuseError
from rob.common.exported import described_in, read_metadata
from rob.common.files import replacing
from rob.common.images.beton import Beton
from rob.common.run import pick_device
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.evaluate.network import FrozenNetwork
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.teachers import Teacher, TeacherConfig, load_teacher


def run(config: ClaimsConfig) -> Report:
    """Do what is not done yet, and report what is there. FailureError is a run's own: the others go on."""
    started = monotonic()
    rows = chosen(config.rows)
    keep_settings(config.out, settings(config))
    jobs = list(all_jobs(config, rows))
    todo = [job for job in jobs if not job.result(config.out).exists()]
    prepare(config, [job.row for job in todo])
    failed = do_all(
        partial(one_run, config), todo, config.jobs, None if config.time_limit is None else started + config.time_limit
    )
    report = table(config, rows, jobs)
    left = len([job for job in todo if not job.result(config.out).exists()])
    print(
        f"{len(jobs) - left} of {len(jobs)} runs are done, {failed} failed, {monotonic() - started:.0f} s", flush=True
    )
    return report


def settings(config: ClaimsConfig) -> dict[str, Any]:
    """What all results in ``config.out`` depend on."""
    names = ("epochs", "batch_size", "views", "num_local", "recipe", "prototypes", "teacher_size", "teacher_temp")
    return {
        "train": Beton(config.train).manifest.fingerprint,
        "test": Beton(config.test).manifest.fingerprint,
        "device": pick_device(config.device).type,
        **{name: asdict(config)[name] for name in (*names, "linear_epochs", "finetune_epochs")},
        "teacher": None if config.teacher is None else str(config.teacher.checkpoint or config.teacher.name),
    }


def prepare(config: ClaimsConfig, rows: list[Row]) -> None:
    """What ``rows`` need besides the images, made if it is not there. MisuseError: there is no teacher to make it."""
    teacher: Teacher | None = None
    for row in rows:
        path = config.store_of(row) if row.kind in USES_STORE else config.tuned_path
        ready = row.objective is None or row.kind in ("momentum", "labels") or (path / "zarr.json").exists()
        if config.teacher is None:
            if not ready:
                raise MisuseError(f"row {row.name}: there is no {path} yet, and no teacher to make it: give --teacher")
            continue
        if row.kind == "tuned":
            tuned(config, load_teacher(config.teacher).to(pick_device(config.device)))
        elif row.kind in USES_STORE and row.objective is not None:
            teacher = teacher or load_teacher(config.teacher)
            cached_store(config, row, teacher)


def cached_store(config: ClaimsConfig, row: Row, teacher: Teacher) -> None:
    """The row's store, and beside it the seconds that it took."""
    assert config.teacher is not None
    path, encoding = config.store_of(row), row.encoding
    cost = cost_of(path)
    if cost.exists():
        return
    temp = config.teacher_temp or teacher.teacher_temp
    if encoding.kind == "topk" and temp:
        encoding = replace(encoding, temps=tuple(sorted({*encoding.temps, temp})))
    before = None if path.exists() else begin_with_fewer_views(config, row)
    start = perf_counter()
    cache_teacher(
        CacheConfig(
            config.train, path, config.teacher, get_recipe(row.recipe or config.recipe), row.views or config.views,
            encoding=encoding, view_size=config.teacher_size or teacher.view_size, device=config.device,
            prototypes=0 if teacher.num_prototypes else config.prototypes,
            loader=LoaderConfig(batch_size=256, workers=config.workers),
        ),
        teacher=teacher,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    seconds = None if before is None else before + perf_counter() - start
    with replacing(cost) as file:
        file.write(json.dumps({"teacher_seconds": seconds, "store_mb": size / 1e6}).encode())


def begin_with_fewer_views(config: ClaimsConfig, row: Row) -> float | None:
    """Copy the largest store of fewer of the row's views, which caching then adds to. The seconds that the teacher took for
    those: 0 if there is none, None if they are not known."""
    path = config.store_of(row)
    for views in range((row.views or config.views) - 1, 0, -1):
        fewer = config.store_of(replace(row, views=views))
        if cost_of(fewer).exists():
            temporary = path.with_name(f".{path.name}.copy")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(fewer, temporary).rename(path)
            return json.loads(cost_of(fewer).read_text())["teacher_seconds"]
    return 0.0


def cost_of(store: Path) -> Path:
    """Beside a whole store: the seconds and bytes that it took."""
    return store.with_suffix(".json")


def all_jobs(config: ClaimsConfig, rows: list[Row]) -> Iterator[Job]:
    """In the order in which they are done."""
    for seed in config.seeds:
        for row in rows:
            for student in config.students:
                yield Job(student, row, seed)


# ==== the table ====


def table(config: ClaimsConfig, rows: list[Row], jobs: list[Job]) -> Report:
    """A row for each student and setting of which there are results, over the seeds; the runs themselves go to ``runs.jsonl``."""
    device = pick_device(config.device)
    found = [result_of(config, job) for job in jobs if job.result(config.out).exists()]
    shown: list[dict[str, Any]] = []
    for student in config.students:
        for row in rows:
            if (line := over_seeds(found, student, row)) is None:
                continue
            cost = cost_of(config.store_of(row))
            if row.objective is not None and row.kind in USES_STORE and cost.exists():
                line |= json.loads(cost.read_text())
            shown.append(line | {"student_views": row.seen(config.num_local), "besides": row.besides})
    shown += of_the_teacher(config)
    with replacing(config.out / "runs.jsonl") as file:
        for run in found:
            kept = {name: value for name, value in run.items() if not name.endswith("knn_hits")}
            file.write((json.dumps(kept) + "\n").encode())
    work = {
        "images": Beton(config.train).num_images,
        "test_images": Beton(config.test).num_images,
        "store": store_facts(config, rows),
        **settings(config),
        "jobs": config.jobs,
        "image_size": IMAGE_SIZE,
        "local_size": LOCAL_SIZE,
        "students": {name: STUDENTS.get(name.partition(":")[0], name) for name in config.students},
    }
    return Report.of("claims", device, work, shown, {})


def result_of(config: ClaimsConfig, job: Job) -> dict[str, Any]:
    """MisuseError: it is of a row that was another then."""
    result, of = json.loads(job.result(config.out).read_text()), made_of(job)
    if result.get("of", of) != of:
        raise MisuseError(
            f"{job.result(config.out)}: row {job.row.name} has changed since: remove the file and "
            f"{job.folder(config.out)} to run it again"
        )
    return result


def store_facts(config: ClaimsConfig, rows: list[Row]) -> dict[str, Any]:
    """What the first store there is says of its teacher."""
    for row in rows:
        if row.kind in USES_STORE and (config.store_of(row) / "zarr.json").exists():
            manifest = TargetStore.open(config.store_of(row)).manifest
            names = ("teacher", "weights_hash", "head", "num_prototypes", "view_size", "teacher_temp")
            return {name: getattr(manifest, name) for name in names}
    return {}


def of_the_teacher(config: ClaimsConfig) -> list[dict[str, Any]]:
    """What there is to reach, measured once."""
    if config.teacher is None:
        return []
    path, device = config.out / "teacher.json", pick_device(config.device)
    if not path.exists():
        teacher = load_teacher(config.teacher).to(device)
        network = FrozenNetwork.teacher(teacher, config.teacher_size or teacher.view_size, device)
        with replacing(path) as file:
            file.write(json.dumps(measured(config, network)).encode())
    found = json.loads(path.read_text())
    return [{"student": "(teacher)", "setting": config.teacher.name, **{name: found[name] for name in MEASURES}}]


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
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--teacher", help="a file of rob export-teacher or rob train-student, a name, or NAME=FILE")
    parser.add_argument("--store", type=Path, help="made if absent")
    parser.add_argument("--students", default="cnn,vit")
    parser.add_argument("--rows", default=",".join(GROUPS), help=f"of {', '.join((*GROUPS, *ROWS))}")
    parser.add_argument("--seeds", type=int, default=3)
    for name in (
        "epochs",
        "batch_size",
        "views",
        "num_local",
        "prototypes",
        "linear_epochs",
        "finetune_epochs",
        "jobs",
        "workers",
    ):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(ClaimsConfig, name))
    parser.add_argument("--teacher-size", type=int)
    parser.add_argument("--teacher-temp", type=float)
    parser.add_argument("--recipe", default=ClaimsConfig.recipe)
    parser.add_argument("--time-limit", type=float, help="seconds after which no further run begins")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--report", type=Path, help="JSON to write; default benchmarks/results/claims_DEVICE_DATE.json")
    given = vars(parser.parse_args())
    path, train = given.pop("report"), given.pop("data")
    given |= {name: tuple(given[name].split(",")) for name in ("students", "rows")}
    given |= {"seeds": tuple(range(given["seeds"])), "teacher": given["teacher"] and teacher_of(given["teacher"])}
    try:
        report = run(ClaimsConfig(train=train, **given))
    except MisuseError as error:
        sys.exit(f"error: {error}")
    report.show()
    print(report.write(path))


if __name__ == "__main__":
    main()
