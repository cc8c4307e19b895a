"""``rob bench`` as it is typed: the smallest pipeline, whose sides must agree, and the report that it writes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from rob.benchmarks import pipeline
from rob.teacher_cache.teachers import TeacherConfig
from support.tiny import TEACHER


def test_a_bench_shows_and_writes_what_it_measured(rob, made, tmp_path, monkeypatch):
    tiny = TeacherConfig(TEACHER, made.checkpoint)

    @dataclass(frozen=True)
    class Smallest(pipeline.PipelineConfig):
        data: Path | None = made.data
        teacher: TeacherConfig = tiny
        teacher_size: int = 32
        patch_size: int = 96
        batch_size: int = 2
        rounds: int = 2
        steps: int = 1

    monkeypatch.setattr(pipeline, "PipelineConfig", Smallest)
    outcome = rob("bench", "pipeline", "--out", tmp_path / "report.json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["name"], report["work"]["images"]) == ("pipeline", 24)
    speed = {row["side"]: row["images_per_second"] for row in report["rows"]}
    sides = {"cached", "online", "student only"}
    assert speed.keys() == sides | {"cached, patches", "student only, patches"}
    assert report["ratios"]["cached_vs_online"] == pytest.approx(speed["cached"] / speed["online"])
    assert "cached_vs_online = " in outcome.out
