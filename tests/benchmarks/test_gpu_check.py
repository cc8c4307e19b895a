"""The check of a GPU where there is none: its sections at toy size, and what becomes of one that fails, dies or hangs."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rob.benchmarks.gpu_check import check, kernels, views
from rob.benchmarks.gpu_check.check import kept, passed, run, settings_of, status_of
from rob.benchmarks.gpu_check.config import SECTIONS, GpuCheckConfig
from rob.benchmarks.gpu_check.losses import bound, fastest
from rob.benchmarks.gpu_check.section import Section, brief
from rob.benchmarks.gpu_check.waits import waits
from rob.common.errors import MisuseError


@pytest.mark.slow
def test_every_section_passes_at_toy_size(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, told = tmp_path / "check.json", []
    report = run(GpuCheckConfig(out, dry_run=True), told.append)
    assert {name: section["status"] for name, section in report["sections"].items()} == {
        name: "passed" if correct else "measured" for name, (_, correct) in SECTIONS.items()
    }, told
    assert passed(report)
    assert len(told) == len(SECTIONS)
    assert json.loads(out.read_text())["sections"].keys() == SECTIONS.keys()
    assert not (tmp_path / "cache").exists()  # nothing is stored of a dry run
    waits = report["sections"]["waits"]["rows"]
    assert {"dino", "swav", "moco", "seed"} <= {row["objective"] for row in waits}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rob", "gpu-check", "--out", str(tmp_path / "check.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch finds no CUDA device here")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_section_that_is_none_is_refused() -> None:
    with pytest.raises(MisuseError, match="section"):
        GpuCheckConfig(section="loses")


SECONDS = 7
WORKER = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
for name, seconds in asked["sections"]:
    print(json.dumps({"begins": name}), flush=True)
    if name == "losses":
        print(json.dumps({"partly": name, "seconds": 1.0, "checks": [{"check": "first", "passed": True}]}), flush=True)
        os._exit(139)
    if name == "stage1":
        time.sleep(600)
    ended = {"error": "ValueError: broken"} if name == "views" else {}
    print(json.dumps({"ends": name, "seconds": 0.1, "checks": [{"check": "x", "passed": True}], **ended}), flush=True)
"""


def test_one_that_raises_dies_or_hangs_leaves_the_others(tmp_path: Path, monkeypatch) -> None:
    """A worker that raises in one section, is killed in another and hangs in a third."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    started, popen = [], subprocess.Popen

    def start(command, **options):
        started.append(command[2])
        is_worker = "worker" in command[2]
        return popen([sys.executable, *([str(script), *command[3:]] if is_worker else ["-c", ""])], **options)

    monkeypatch.setattr(check.subprocess, "Popen", start)
    monkeypatch.setattr(check, "GRACE", 3)
    monkeypatch.setattr(check, "LONGEST_WAIT", 0)
    report = run(GpuCheckConfig(tmp_path / "check.json", dry_run=True, seconds=SECONDS))
    states = {name: section["status"] for name, section in report["sections"].items()}
    assert states == {
        "ceilings": "measured",
        "views": "failed",
        "losses": "failed",
        "stage1": "failed",
        "stage2": "passed",
        "ranks": "passed",
        "waits": "measured",
        "kernels": "measured",
    }
    assert "exit code 139" in report["sections"]["losses"]["error"]
    assert report["sections"]["losses"]["checks"][0]["check"] == "first"  # what was known by then is kept
    assert "no end after" in report["sections"]["stage1"]["error"]
    assert sum("worker" in name for name in started) == 3
    assert not passed(report)


def test_what_fails_in_a_section_is_told_apart() -> None:
    section = Section("views", torch.device("cpu"), Path("."), seconds=60)
    section.attempt("a", lambda: section.check("a", 0.5, 1.0))
    assert status_of("views", section.outcome()) == "passed"
    section.attempt("b", lambda: section.check("b", float("nan"), 1.0))
    assert status_of("views", section.outcome()) == "failed"
    section.checks.clear()
    assert status_of("views", section.outcome()) == "not reached"
    assert status_of("views", {"not_here": "no triton"}) == "not here"
    section.attempt("c", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert "ZeroDivisionError" in section.checks[0]["error"]
    section.seconds = 0
    section.attempt("d", lambda: pytest.fail("there is no time left"))
    assert section.notes == ["d: not reached in time"]


def test_an_error_is_one_line_with_its_place() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        assert brief(error).startswith("ValueError: two lines (test_gpu_check.py:")


def test_the_settings_of_the_sections_are_joined() -> None:
    sections = {"losses": {"settings": {"loss": {"65536x256": "triton"}}}, "stage2": {"settings": {"loader": "gpu"}}}
    found = settings_of({"sections": sections})
    assert found.loss == {"65536x256": "triton"}
    assert (found.loader, found.compile) == ("gpu", None)


def test_the_fastest_call_says_which_loss_is_kept() -> None:
    sizes = {"prototypes": 65536, "width": 256, "exact": True}
    rows = [
        sizes | {"impl": "triton", "ms": 2.9, "fastest_ms": 2.5},
        sizes | {"impl": "chunked", "ms": 2.8, "fastest_ms": 2.7},  # its median was luckier
        sizes
        | {"impl": "eager", "ms": 1.0, "fastest_ms": 1.0},  # not a fused form: choice.py says up to where it is taken
    ]
    assert fastest(rows) == {"65536x256": "triton"}


def test_a_report_becomes_a_result_to_keep() -> None:
    section = {
        "status": "failed", "seconds": 1.0, "notes": ["b: not reached in time"], "settings": {"loader": "gpu"},
        "checks": [{"check": "a", "value": 2.0, "limit": 1.0, "passed": False}], "rows": [{"what": "x", "ms": 3.0}],
    }  # fmt: skip
    result = kept({"device": "G", "scale": "full", "versions": {"torch": "2"}, "sections": {"views": section}})
    assert (result.name, result.device, result.rows) == (
        "gpu_check",
        "G",
        [{"section": "views", "what": "x", "ms": 3.0}],
    )
    of = result.work["sections"]["views"]
    assert (of["checks"], of["failed"], of["not_reached"]) == (1, ["a"], ["b: not reached in time"])
    assert result.work["settings"]["loader"] == "gpu"


def test_host_bound_rows_are_told_apart() -> None:
    assert [bound({"ms": 2.0, "host_ms": host}) for host in (1.0, 1.9, 2.1)] == ["device", "host", "host"]


def test_only_waits_of_the_step_are_counted() -> None:
    with waits(torch.device("cpu")) as found:
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )
        warnings.warn("something else", stacklevel=2)
        assert not found
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=2)
    assert sum(found.values()) == 1


def test_views_are_timed_after_one_case_of_each_filter(monkeypatch) -> None:
    done = []
    section = Section("views", torch.device("cpu"), Path("."), seconds=60, toy=False)
    monkeypatch.setattr(section, "attempt", lambda what, work: done.append(what))
    monkeypatch.setattr(section, "measure", lambda what, work: done.append(what))
    views.run(section)
    assert done[:2] == ["bilinear, YCbCr, 96 px", "bicubic, YCbCr, 96 px"]
    assert done[2:6] == [
        "colours",
        "bilinear views from planes",
        "bicubic views from planes",
        "colours of resized views",
    ]
    assert len(done) == 12 + 4


def test_compiled_kernels_are_listed_once_they_ran() -> None:
    metadata = SimpleNamespace(num_warps=8, num_stages=3, shared=96 << 10)
    ran = SimpleNamespace(metadata=metadata, n_regs=126, n_spills=0)
    cache = {"a": ran, "b": SimpleNamespace(metadata=metadata, n_regs=None)}  # only compiled: nobody knows
    (row,) = kernels.compiled("k", SimpleNamespace(device_caches={0: (cache, {})}))
    assert (row["kernel"], row["registers"], row["spilled_bytes"], row["shared_kib"]) == ("k", 126, 0, 96)


def test_what_a_section_leaves_of_its_time_the_next_has(tmp_path: Path) -> None:
    asked = {
        "sections": [["kernels", 50.0], ["kernels", 10.0]],
        "device": "cpu",
        "data": str(tmp_path),
        "toy": True,
        "quick": False,
    }
    done = subprocess.run(
        [sys.executable, "-m", "rob.benchmarks.gpu_check.worker", json.dumps(asked)], capture_output=True, text=True
    )
    begun = [told["seconds"] for told in map(json.loads, done.stdout.splitlines()) if "begins" in told]
    assert begun[0] == 50 and 55 < begun[1] <= 60
