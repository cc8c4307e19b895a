"""How long a command shows nothing: seconds from its start to its first byte on a terminal, each in a process of its own.

    python benchmarks/first_output.py out/ [--checkout OTHER] [--only views inspect ...]

``out`` keeps the small inputs, which are made first with the commands themselves: 64 drawn images, a teacher's targets of them
and a run. ``--checkout`` has the commands of another checkout of rob (its folder), to compare with; what that one does not know
is left out. CPU seconds are those of the process until then, which other work on the machine changes little.
"""

import argparse
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rob.benchmarks.report import Report

IMAGES, SIDE = 64, 64
LONGEST = 300.0
"""Seconds that a command is waited for."""
TICKS = os.sysconf("SC_CLK_TCK")
STUDENT = "--student test_resnet --image-size 32 --epochs 1 --batch-size 16 --hidden-dim 32"
"""Of the run that the others look at."""
COMMANDS = {
    "pack": "pack photos {new}.beton",
    "views": "views {new}.png --data data.beton",
    "teachers": "teachers",
    "cache-teacher": "cache-teacher data.beton {new}.zarr --teacher efficientnet_lite0 --view-size 32",
    "inspect": "inspect data.beton",
    "inspect with a sheet": "inspect targets.zarr --sheet {new}.png --data data.beton",
    "students": "students",
    "train-student": f"train-student data.beton --targets targets.zarr --out {{new}} {STUDENT}",
    "eval knn": "eval knn run data.beton --test data.beton --out {new}",
    "eval linear": "eval linear run data.beton --test data.beton --out {new}",
    "eval lowshot": "eval lowshot run data.beton --test data.beton --per-class 5 --out {new}",
    "compare": "compare run --out {new}.png",
    "sweep": "sweep {new} --vary lr=0.001,0.002 -- data.beton --targets targets.zarr " + STUDENT,
    "embed": "embed run data.beton {new}.npy",
    "export": "export run --to timm",
    "export-teacher": "export-teacher run {new}.safetensors",
    "verify": "verify targets.zarr data.beton --teacher efficientnet_lite0",
    "check": "check data.beton targets.zarr run",
    "demo": "demo --out {new}",
    "bench loss": "bench loss --out {new}.json",
    "help": "--help",
    "help of train-student": "train-student --help",
}


def prepare(out: Path) -> None:
    """What the commands look at."""
    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        path = out / "photos" / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    made = {
        "data.beton": "pack photos data.beton",
        "targets.zarr/zarr.json": "cache-teacher data.beton targets.zarr --teacher efficientnet_lite0 --view-size 32",
        "run/student.safetensors": f"train-student data.beton --targets targets.zarr --out run {STUDENT}",
    }
    for path, words in made.items():
        if not (out / path).exists():
            subprocess.run([sys.executable, "-m", "rob", *words.split()], cwd=out, check=True)


def first_output(words: list[str], out: Path, environment: dict[str, str]) -> tuple[float, float, str] | None:
    """Seconds and CPU seconds to the first output, and its beginning; the command is then ended. None: there was none."""
    ours, theirs = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rob", *words],
        cwd=out,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        if not select.select([ours], [], [], LONGEST)[0]:
            return None
        seconds, fields = time.perf_counter() - began, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
        computed = sum(map(int, fields.split()[11:13])) / TICKS
        time.sleep(0.2)
        return seconds, computed, os.read(ours, 2000).decode(errors="replace")
    except OSError:  # the terminal of a process that ended without a word
        return None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to the first output of every command.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, help="folder of another checkout of rob, whose commands are run")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--json", type=Path, help="default benchmarks/results/first_output_DEVICE_DATE.json")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    environment = dict(os.environ)
    if arguments.checkout:
        place = out / "checkout"
        place.mkdir(exist_ok=True)
        (place / "rob").unlink(missing_ok=True)
        (place / "rob").symlink_to(arguments.checkout.absolute())
        environment["PYTHONPATH"] = str(place)
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        words = COMMANDS[name].format(new=out / f"new-{os.getpid()}-{len(rows)}").split()
        found = first_output(words, out, environment)
        said = "" if found is None else found[2].strip().splitlines()[0][:60] if found[2].strip() else ""
        if said.startswith("error:") or "No such command" in said or ("Usage:" in said and "help" not in name):
            continue  # a checkout without that command, or what it needs
        seconds, computed = (None, None) if found is None else (round(found[0], 2), round(found[1], 2))
        rows.append({"command": name, "seconds": seconds, "cpu_seconds": computed})
        print(f"{name:22} {seconds} s, CPU {computed} s", flush=True)
    load = os.getloadavg()[0]
    work = {"checkout": arguments.checkout.name if arguments.checkout else "this one", "images": IMAGES, "load": load}
    slowest = max((row["seconds"] or LONGEST for row in rows), default=None)
    report = Report.of("first_output", torch.device("cpu"), work, rows, {"slowest": slowest})
    report.show()
    print(f"written to {report.write(arguments.json)}")


if __name__ == "__main__":
    main()
