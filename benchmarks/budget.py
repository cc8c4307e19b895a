"""Students that have the same time: from a cache, with the teacher in every step, and without one.

    python benchmarks/budget.py runs/budget --data train.beton --test test.beton --teacher resnet10t \\
        --checkpoint assets/teacher_cifar10.safetensors --image-size 32 --budget 4m --jobs 2

Plain commands: ``rob cache-teacher`` once, then for each run ``rob train-student --budget``, whose plan makes of the time what it
can, and ``rob eval knn`` and ``linear`` of what came out and of the same network's random start. The views of a live teacher are
those that a cache would have. Caching is beside the budget; its seconds are in the result. ``--jobs`` runs share the machine:
then each has less of it.

A command that is done is not done again: killed, or called with more runs, the script goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rob.benchmarks.processes import rob
from rob.benchmarks.report import Report
from rob.common.run import pick_device

RUNS = (
    "mobilenetv3_small_100:cached",
    "mobilenetv3_small_100:cached:embedding",
    "mobilenetv3_small_100:live:embedding",
    "mobilenetv3_small_100:none",
    "resnet18:cached:embedding",
    "vit_tiny_patch16_224:cached:embedding",
)
"""Student, targets, and the objective where it is not the usual one of such targets."""
NO_TEACHER = (
    "--objective swav --teacher-temp 0.01 --sinkhorn batch --recipe sslight --num-local 0 --prototypes 512 --hidden-dim 512 "
    "--optimiser lars --trust 0.02 --lr 0.15 --weight-decay 1e-6"
)
"""What did best for a MobileNet without a teacher on few small images (``rob students``)."""
PLANNED = "planned.json"


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    out: Path
    data: Path
    test: Path
    teacher: tuple[str, ...]
    image_size: int
    budget: str

    @property
    def store(self) -> Path:
        return self.out / "targets.zarr"


def cache(setting: Setting) -> float:
    """Seconds of caching; 0 where the store was there."""
    start = time.perf_counter()
    done = (setting.store / "zarr.json").exists()
    rob("cache-teacher", setting.data, setting.store, *setting.teacher)  # a complete store is left as it is
    return 0.0 if done else time.perf_counter() - start


def train(setting: Setting, run: Path, student: str, targets: str, *objective: str) -> None:
    """``rob train-student``, and the seconds until its plan was there."""
    words = {
        "cached": ["--targets", setting.store],
        "live": ["--targets", "online", *setting.teacher],
        "none": ["--targets", "momentum", *NO_TEACHER.split()],
    }[targets]
    command = [sys.executable, "-m", "rob", "train-student", setting.data, *words, "--out", run, "--student", student]
    command += ["--image-size", setting.image_size, "--budget", setting.budget]
    command += ["--objective", *objective] if objective else []
    start, planned = time.perf_counter(), None
    with (
        open(f"{run}.log", "w") as log,
        subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if planned is None and line.strip() == "plan":
                planned = time.perf_counter() - start
            print(line, end="", file=log, flush=True)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}: see {run}.log")
    (run / PLANNED).write_text(json.dumps({"plan": planned, "whole": time.perf_counter() - start}))


def top1(setting: Setting, run: Path, protocol: str, *words: str) -> float:
    """Of a protocol, kept in the run folder."""
    result = run / "eval" / f"{'-'.join([protocol, *words[1:]])}.json"
    if not result.exists():
        rob("eval", protocol, run, setting.data, "--test", setting.test, *words)
    return json.loads(result.read_text())["top1"]


def row_of(setting: Setting, name: str) -> dict[str, Any]:
    """A run and what became of it."""
    student, targets, *objective = name.split(":")
    run = setting.out / name.replace(":", "-")
    if not (run / PLANNED).exists():
        train(setting, run, student, targets, *objective)
    config = json.loads((run / "config.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    seconds, batch = json.loads((run / PLANNED).read_text()), config["loader"]["batch_size"]
    return {
        "student": student,
        "targets": targets,
        "objective": config["objective"]["name"],
        "seconds_to_plan": round(seconds["plan"], 1),
        "seconds": round(seconds["whole"], 1),
        "steps": last["step"],
        "batch": batch,
        "images": last["step"] * batch,
        "knn_random": top1(setting, run, "knn", "--init", "random"),
        "knn": top1(setting, run, "knn"),
        "linear": top1(setting, run, "linear"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Students that have the same time: cached, with a live teacher, without."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="labelled images, packed")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--budget", default="4m")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="STUDENT:cached|live|none[:OBJECTIVE]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments = parser.parse_args()
    checkpoint = ("--checkpoint", str(arguments.checkpoint)) if arguments.checkpoint else ()
    setting = Setting(
        arguments.out, arguments.data, arguments.test, ("--teacher", arguments.teacher, *checkpoint),
        arguments.image_size, arguments.budget,
    )  # fmt: skip
    setting.out.mkdir(parents=True, exist_ok=True)
    caching = cache(setting)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda name: row_of(setting, name), arguments.runs))
    work = {
        "data": arguments.data.name, "teacher": arguments.teacher, "image_size": setting.image_size,
        "budget": setting.budget, "at_once": arguments.jobs, "seconds_of_caching": round(caching, 1), "k": 20,
    }  # fmt: skip
    report = Report.of("budget", pick_device("auto"), work, rows, {})
    report.show()
    print(f"written to {report.write()}")


if __name__ == "__main__":
    main()
