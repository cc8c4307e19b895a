"""The prototype cross-entropy on a GPU in one go: times by size, what its parts cost, whether it is exact.

    python -m rob.benchmarks.loss_gpu OUT.json [SECONDS]

All in a process of its own; where that dies, or its device does not answer any more, another goes on behind what broke.
OUT.json is written after every row. Exit code 1 if one of our implementations is not exact.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rob.benchmarks.loss_cases import check_losses
from rob.benchmarks.loss_sizes import COMPILED, SIZES, Size, brief, measure_losses, measure_parts

BROKEN_DEVICE = 3
"""Exit code of a process whose device does not answer any more."""


def named(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


TASKS = (named(SIZES[0]), "parts", "check", *map(named, SIZES[1:]), "torch.compile")
"""In this order, as far as the time goes."""


class Results:
    """What is known, in a file after every addition."""

    def __init__(self, path: Path) -> None:
        self.path = path
        empty: dict[str, list[Any]] = {"rows": [], "parts": [], "failures": [], "begun": [], "device": []}
        self.found = json.loads(path.read_text()) if path.exists() else empty

    def add(self, what: str, *values: Any) -> None:
        self.found[what] += values
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def passed(self) -> bool:
        """Whether something of ours was measured, and all of it was exact."""
        ours = [row for row in self.found["rows"] if row.get("impl") in ("triton", "chunked")]
        return bool(ours) and all(row.get("exact") for row in ours) and not self.found["failures"]


def do(results: Results, tasks: list[str], seconds: float) -> None:
    """``tasks``, one after the other, in this process."""
    device, ends = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter() + seconds
    if device.type == "cuda":
        results.add("device", torch.cuda.get_device_name(device), torch.__version__)

    def said(row: dict[str, Any]) -> None:
        results.add("rows", row)
        print(line(row), flush=True)
        answers(device)

    for task in tasks:
        if (left := ends - time.perf_counter()) <= 0:
            print(f"{task} and what follows: no time left", flush=True)
            return
        results.add("begun", task)
        try:
            match task:
                case "check":
                    failed = check_losses(device)
                    results.add("failures", *failed)
                    print("\n".join(failed) or "every fused form is exact in every case", flush=True)
                case "parts":
                    found = measure_parts(device=device)
                    results.add("parts", *found)
                    print("\n".join(map(line_of_part, found)), flush=True)
                case "torch.compile":
                    measure_losses(COMPILED, left, device, said=said, compiled=True)
                case _:
                    k, d = task.split("x")
                    measure_losses([(int(k), int(d))], left, device, said=said)
        except Exception as error:
            results.add("failures", f"{task}: {brief(error)}")
            print(f"{task}: {brief(error)}", flush=True)
        answers(device)


def answers(device: torch.device) -> None:
    """Ends the process if the device does not: whatever else would run at exit may wait for it for ever."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            print(brief(error), flush=True)
            os._exit(BROKEN_DEVICE)


def line(row: dict[str, Any]) -> str:
    at = f"K {row['prototypes']:6} D {row['width']:4} {row.get('impl', '-'):14}"
    if "ms" not in row:
        return f"{at} {row.get('error', '')}"
    off = max(row["errors"]) if "errors" in row else float("nan")
    return (
        f"{at} {row['ms']:8.3f} ms, launched in {row['host_ms']:6.2f} ms, {row['of_floor']:5.1%} of the floor, "
        f"{row.get('extra_mb') or 0:7.0f} MB, error {off:.1e} {row.get('error', '')}"
    )


def line_of_part(row: dict[str, Any]) -> str:
    took = f"{row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s" if "ms" in row else row["error"]
    return f"{row['part']:100} {took}"


def main(path: Path, seconds: float = 85.0) -> int:
    ends = time.perf_counter() + seconds
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = list(TASKS)
    while tasks and (left := ends - time.perf_counter()) > 0:
        command = [sys.executable, "-m", "rob.benchmarks.loss_gpu", str(path), str(left), ",".join(tasks)]
        try:
            code = subprocess.run(command, timeout=left + 15).returncode
        except subprocess.TimeoutExpired:
            print(f"stopped after {seconds:.0f} s", flush=True)
            break
        if code == 0:
            break
        results = Results(path)
        broke = results.found["begun"][-1] if results.found["begun"] else tasks[0]
        results.add("failures", f"{broke}: its process ended with {code}")
        tasks = [task for task in tasks if task not in {*results.found["begun"], broke}]
    return 0 if Results(path).passed() else 1


if __name__ == "__main__":
    if len(sys.argv) > 3:
        do(Results(Path(sys.argv[1])), sys.argv[3].split(","), float(sys.argv[2]))
    else:
        sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 85.0))
