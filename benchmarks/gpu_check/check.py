"""``rob gpu-check``: what works on this GPU, how fast, and what a run should choose there.

A worker process runs the sections. One that raises is reported and the others go on; where the process or the device dies with
it, or it takes far too long, the next ones get a new process. The JSON is written after each.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rob.benchmarks.gpu_check.config import SECTIONS, GpuCheckConfig
from rob.benchmarks.gpu_check.images import LONGEST_WAIT
from rob.benchmarks.report import PACKAGES, Report, device_name
from rob.common.device_settings import DeviceSettings, store_settings
from rob.common.errors import MisuseError
from rob.common.files import refuse_existing, replacing
from rob.common.run import versions

PHOTOGRAPHS = {"toy": 16, "quick": 512, "full": 1024}
GRACE = 45
"""Seconds beyond its own and the photographs' that a section gets before its process is ended."""


def run(config: GpuCheckConfig, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Run the sections and write ``config.out``; what it holds. ``told`` gets a line a section.

    MisuseError: there is no CUDA device, and it is no dry run; or a file is there already.
    """
    if not config.dry_run and not torch.cuda.is_available():
        raise MisuseError("torch finds no CUDA device here, and `gpu-check` measures one: see nvidia-smi, or `dry_run`")
    for path in (config.out, config.out.with_suffix(".log")):
        refuse_existing(path, config.overwrite)
    device = torch.device("cpu" if config.dry_run else "cuda")
    names = [config.section] if config.section else list(SECTIONS)
    seconds = config.seconds or (600 if config.dry_run else 90 if config.quick else 400)
    whole = sum(SECTIONS[name][0] for name in names)
    pending = [(name, seconds * SECTIONS[name][0] / whole) for name in names]
    report: dict[str, Any] = {
        "device": device_name(device),
        "scale": config.scale,
        "versions": versions(*PACKAGES),
        "sections": {},
    }
    with tempfile.TemporaryDirectory(prefix="rob-gpu-check-") as folder, _photographs(config, Path(folder), names):
        while pending:
            for name, outcome in _one_process(config, device, Path(folder), pending, report["sections"]):
                pending = [(other, s) for other, s in pending if other != name]
                report["sections"][name] = {"status": status_of(name, outcome), **outcome}
                _write(config.out, report)
                told(line_of(name, report["sections"][name]))
    if not config.dry_run and not config.section:
        report["stored"] = str(store_settings(device, settings_of(report)))
        _write(config.out, report)
    return report


def passed(report: dict[str, Any]) -> bool:
    """Whether every section of correctness that ran did so to its end without a check that failed, and no other one failed."""
    states = [section["status"] for name, section in report["sections"].items() if SECTIONS[name][1]]
    states += [s["status"] for s in report["sections"].values() if s["status"] == "failed"]
    return all(state == "passed" for state in states)


def status_of(name: str, outcome: dict[str, Any]) -> str:
    if "error" in outcome or any(not made["passed"] for made in outcome.get("checks", ())):
        return "failed"
    if "not_here" in outcome:
        return "not here"
    if not SECTIONS[name][1]:
        return "measured"
    return "passed" if outcome.get("checks") else "not reached"


def line_of(name: str, section: dict[str, Any]) -> str:
    """One section in a line, and the checks of it that failed below."""
    checks = section.get("checks", ())
    failed = [made for made in checks if not made["passed"]]
    text = (
        f"{name}: {section['status']}, {len(checks) - len(failed)} of {len(checks)} checks, {section['seconds']:.0f} s"
    )
    for key in ("error", "not_here"):
        text += f"\n  {section[key]}" if key in section else ""
    for said in section.get("notes", ())[:12]:
        text += f"\n  {said}"
    for made in failed[:12]:
        told = made.get("error") or f"{made['value']:.3g}, at most {made['limit']:g}"
        text += f"\n  {made['check']}: {told}"
    return text + (f"\n  and {len(failed) - 12} more" if len(failed) > 12 else "")


def tables(report: dict[str, Any]) -> list[Report]:
    """What each section measured, and at last how all of them ended."""
    device, of = report["device"], report["versions"]
    found = [
        Report(name, device, {}, section["rows"], {}, of)
        for name, section in report["sections"].items()
        if section.get("rows")
    ]
    rows = [
        {
            "section": name,
            "status": section["status"],
            "checks": len(section.get("checks", ())),
            "failed": sum(not made["passed"] for made in section.get("checks", ())),
            "seconds": section["seconds"],
        }
        for name, section in report["sections"].items()
    ]
    return [*found, Report("gpu-check", device, {}, rows, {}, of)]


def kept(report: dict[str, Any]) -> Report:
    """All rows in the form of the other results: to be kept in ``benchmarks/results``."""
    sections = report["sections"]
    rows = [{"section": name, **row} for name, section in sections.items() for row in section.get("rows", ())]
    work = {
        "scale": report["scale"],
        "sections": {
            name: {
                "status": section["status"],
                "seconds": section["seconds"],
                "checks": len(section.get("checks", ())),
                "failed": [made["check"] for made in section.get("checks", ()) if not made["passed"]],
                "not_reached": section.get("notes", []),
            }
            for name, section in sections.items()
        },
        "checks": [
            {"section": name, **made} for name, section in sections.items() for made in section.get("checks", ())
        ],
        "settings": asdict(settings_of(report)),
    }
    return Report("gpu_check", report["device"], work, rows, {}, report["versions"])


def settings_of(report: dict[str, Any]) -> DeviceSettings:
    """What the sections found best; what they did not measure stays open."""
    found: dict[str, Any] = {}
    for section in report["sections"].values():
        found |= section.get("settings", {})
    return DeviceSettings(**{name: found[name] for name in ("loss", "loader", "compile") if name in found})


# ==== processes ====


@contextmanager
def _photographs(config: GpuCheckConfig, folder: Path, names: Sequence[str]):
    """Packed beside the first sections, where a section needs them."""
    if not {"stage1", "stage2"} & set(names):
        yield
        return
    count = str(PHOTOGRAPHS[config.scale])
    command = [sys.executable, "-m", "rob.benchmarks.gpu_check.images", str(folder), count]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "images.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    threading.Thread(target=_note_death, args=(process, folder), daemon=True).start()
    try:
        yield
    finally:
        _end(process)


def _note_death(process: subprocess.Popen, folder: Path) -> None:
    """A process that dies without a word has failed, too."""
    with suppress(OSError):
        if process.wait() and not (folder / "failed").exists():
            (folder / "failed").write_text(f"their process ended with {process.returncode}")


def _one_process(config: GpuCheckConfig, device: torch.device, folder: Path, pending: list, done: dict):
    """Yields (section, outcome) of ``pending`` from one worker, until it has run all or dies; at least one is yielded."""
    asked = {
        "sections": pending, "device": device.type, "data": str(folder),
        "toy": config.dry_run, "quick": config.quick,
    }  # fmt: skip
    log_path = config.out.with_suffix(".log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "a" if done else "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rob.benchmarks.gpu_check.worker", json.dumps(asked)],
            stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    limits, running, any_ended, partly = dict(pending), pending[0][0], False, {}
    started, limit = time.perf_counter(), limits[running] + 2 * GRACE  # the first of a process imports everything
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.1, started + limit - time.perf_counter()))
            except queue.Empty:
                yield (
                    running,
                    {**partly, "seconds": limit, "error": f"no end after {limit:.0f} s: its process was ended"},
                )
                return
            if line is None:
                break
            told = json.loads(line)
            if "begins" in told:
                running, started, partly = told["begins"], time.perf_counter(), {}
                limit = (
                    told.get("seconds", limits[running])
                    + GRACE
                    + (LONGEST_WAIT if running in ("stage1", "stage2") else 0)
                )
            elif "partly" in told:
                del told["partly"]
                partly = told
            else:
                any_ended = True
                yield told.pop("ends"), told
                limits.pop(running, None)
                running = next(iter(limits), running)
        code = process.wait()
        if limits and (code not in (0, 3) or not any_ended):
            took = round(time.perf_counter() - started, 1)
            tail = "; ".join(log_path.read_text(errors="replace").splitlines()[-3:])
            yield (
                running,
                {**partly, "seconds": took, "error": f"its process ended with exit code {code}: {tail[-400:]}"},
            )
    finally:
        _end(process)
        reader.join()


def _read(process: subprocess.Popen, lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(path: Path, report: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(report, indent=1, default=str) + "\n").encode())
