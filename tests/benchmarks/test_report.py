"""Benchmarks' reports: what they print where."""

import io

import torch
from rich.console import Console

from rob.benchmarks.report import Report, parts, shown_by

COLUMNS = [f"images_per_second_with_{number}_workers" for number in range(8)]


def printed(console: Console) -> str:
    row = {"setting": "a", **{column: 12345.0 + number for number, column in enumerate(COLUMNS)}}
    Report.of("loader", torch.device("cpu"), {}, [row], {"ratio": 2.0}).show(console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_report_in_a_pipe_has_a_line_a_row():
    lines = printed(Console(file=io.StringIO())).splitlines()
    assert any(all(column.replace("_", " ") in line for column in COLUMNS) for line in lines)
    assert any(all(f"{12345 + number:,}" in line for number in range(8)) for line in lines)
    assert "ratio = 2" in lines


def test_a_report_in_a_terminal_keeps_to_its_width():
    lines = printed(Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)).splitlines()
    assert max(map(len, lines)) <= 100


def test_the_parts_of_a_benchmark_are_counted_while_it_runs():
    shown = []
    with shown_by(lambda *at: shown.append(at)):
        assert [(item, list(shown)) for item in parts("ab")] == [("a", [(0, 2)]), ("b", [(0, 2), (1, 2)])]
    assert shown[-1] == (2, 2)
    assert list(parts("ab")) == ["a", "b"]
    assert len(shown) == 3
