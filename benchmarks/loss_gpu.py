"""The prototype cross-entropy on a GPU in one go: times by size, what its parts cost, whether it is exact.

    python -m rob.benchmarks.loss_gpu OUT.json [SECONDS]

Processes of their own: where the device does not answer any more, a new one goes on with the next size. OUT.json is written after
every row. Exit code 1 if one of our implementations is not exact.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rob.benchmarks.loss_sizes import SIZES, check_losses, measure_losses, measure_parts

BROKEN_DEVICE = 3
"""Exit code of a process whose device does not answer any more."""


@contextmanager
def _written(path: Path) -> Iterator[dict[str, Any]]:
    """The results so far, written again at the end."""
    results = json.loads(path.read_text()) if path.exists() else {"rows": [], "parts": [], "failures": []}
    yield results
    path.write_text(json.dumps(results, indent=1) + "\n")


def _child(path: Path, seconds: float, task: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def said(row: dict[str, Any]) -> None:
        with _written(path) as results:
            results["rows"].append(row)
        print(_line(row), flush=True)
        if "error" in row and device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:
                sys.stdout.flush()
                os._exit(BROKEN_DEVICE)

    if task == "check":
        failed = check_losses(device)
        with _written(path) as results:
            results["failures"] = failed
        print("\n".join(failed) or "every implementation is exact in every case", flush=True)
    elif task == "parts":
        found = measure_parts(device=device)
        with _written(path) as results:
            results["parts"] += found
        for row in found:
            print(
                f"{row['part']:90} {row.get('ms', float('nan')):8.3f} ms",
                f"{row.get('tflops', 0):6.0f} TFLOP/s {row.get('error', '')}",
            )
    else:
        sizes = [(int(k), int(d)) for k, d in (part.split("x") for part in task.split(","))]
        measure_losses(sizes, seconds, device, said=said)


def _line(row: dict[str, Any]) -> str:
    at = f"K {row['prototypes']:6} D {row['width']:4} {row.get('impl', '-'):14}"
    if "ms" not in row:
        return f"{at} {row.get('error', '')}"
    off = max(row["errors"]) if "errors" in row else float("nan")
    return (
        f"{at} {row['ms']:8.3f} ms, launched in {row['host_ms']:6.2f} ms, {row['of_floor']:5.1%} of the floor, "
        f"{row['extra_mb'] or 0:7.0f} MB, error {off:.1e} {row.get('error', '')}"
    )


def main(path: Path, seconds: float = 85.0) -> int:
    """Check, sizes, parts; each in processes of their own."""
    ends = time.perf_counter() + seconds
    path.unlink(missing_ok=True)

    def run(task: str, most: float) -> int:
        command = [sys.executable, "-m", "rob.benchmarks.loss_gpu", str(path), str(most), task]
        try:
            return subprocess.run(command, timeout=most + 20).returncode
        except subprocess.TimeoutExpired:
            print(f"{task}: stopped after {most + 20:.0f} s", flush=True)
            return 1

    first = SIZES[0]
    run(f"{first[0]}x{first[1]}", 0.4 * seconds)
    run("parts", 15)
    left = list(SIZES[1:])
    while left and (most := ends - time.perf_counter() - 0.3 * seconds) > 3:
        code = run(",".join(f"{k}x{d}" for k, d in left), most)
        if code != BROKEN_DEVICE:
            break
        with _written(path) as results:
            reached = {(row["prototypes"], row["width"]) for row in results["rows"]}
        left = [size for size in left if size not in reached]
    run("check", max(10.0, ends - time.perf_counter()))
    with _written(path) as results:
        wrong = [row for row in results["rows"] if row.get("impl") in ("triton", "chunked") and not row.get("exact")]
        return 1 if wrong or results["failures"] or not results["rows"] else 0


if __name__ == "__main__":
    if len(sys.argv) > 3:
        _child(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 85.0))
