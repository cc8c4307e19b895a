"""Help that is instant, and what the parser refuses."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from rob import cli


def commands(group: Any, words: str = "") -> Iterator[str]:
    """``group`` and all below it, as they are typed behind ``rob``."""
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{words} {name}".strip())


COMMANDS = [*commands(get_command(cli.app))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(rob, command):
    outcome = rob(*command.split(), "--help")
    assert outcome.code == 0
    assert outcome.out.lstrip().startswith(f"Usage: rob {command}".rstrip())


def test_help_imports_neither_torch_nor_numpy():
    """A child process, because this one has them already."""
    script = f"""
import contextlib, io, sys
from rob import cli
for command in {COMMANDS!r}:
    sys.argv = ["rob", *command.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main()
    assert "Usage" in text.getvalue()
print(*sorted({{"torch", "numpy", "timm", "zarr", "numba", "ffcv", "PIL", "matplotlib", "onnx", "pyarrow"}} & sys.modules.keys()))
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (child.stdout, child.stderr) == ("\n", "")


@pytest.mark.parametrize("arguments", [("pak",), ("pack", "--jpeg-quality", "101", "a", "b"), ("train-student",)])
def test_what_the_parser_refuses_is_exit_code_2(rob, arguments):
    outcome = rob(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_commands_are_listed_in_the_order_of_the_work(rob):
    listed = rob("--help").out
    places = [listed.index(f"\n  {name} ") for name in ("pack", "cache-teacher", "train-student", "eval", "compare")]
    assert places == sorted(places)
    whole = " ".join(rob("eval", "--help").out.split())  # on several lines, where the terminal is narrow
    assert "the choice made on a tenth of TRAIN, one test." in whole


def under_headings(lines):
    heading = ""
    for line in lines:
        heading = line if line.endswith(":") and not line.startswith(" ") else heading
        yield heading, line


def test_many_options_are_grouped_and_as_wide_as_the_terminal(rob, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    lines = rob("train-student", "--help").out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:6] == ["Arguments:", "Targets:", "Student:", "Objective:", "Head:", "Patches:"]
    assert headings[6:] == [
        "Which views meet:",
        "Run:",
        "Optimiser:",
        "Loading:",
        "Views:",
        "Without a teacher:",
        "Other:",
    ]
    group = {line.split()[0]: heading for heading, line in under_headings(lines) if line.startswith("  --")}
    for option, heading in (("preset", "Run"), ("device", "Run"), ("batch-size", "Run"), ("objective", "Objective"),
                            ("head-norm", "Head"), ("copy-momentum", "Without a teacher")):  # fmt: skip
        assert group[f"--{option}"] == f"{heading}:"
    assert 100 < max(map(len, lines)) <= 150
    for name in ("inspect", "views"):  # of a few, and of many without targets
        assert "Options:" in rob(name, "--help").out.splitlines()


def test_a_range_may_have_a_comma(rob, made, tmp_path):
    data = tmp_path / "\u732b.beton"  # letters that matplotlib's font lacks
    for ending in (".beton", ".beton.json"):
        (tmp_path / f"\u732b{ending}").symlink_to(made.data.with_suffix(ending))
    for number, scale in enumerate(
        (("--global-scale", "0.5,1"), ("--global-scale", "0.5", "1"), ("--global-scale=0.5,1",))
    ):
        outcome = rob("views", tmp_path / f"{number}.png", "--data", data, "--images", 1, *scale)
        assert outcome.code == 0, outcome.err
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 1
    half = rob("views", tmp_path / "half.png", "--global-scale", "0.5", "--data", made.data)
    assert (half.code, half.err) == (2, "error: --global-scale takes 2 numbers: --global-scale 0.5,1\n")


def test_students_are_a_table_of_presets_that_exist(rob):
    from rob.student_train.commands.students import ALONE, WITH_A_TEACHER
    from rob.student_train.presets import PRESETS
    from rob.student_train.students import model_family

    said = rob("students").out
    for names, _, presets in WITH_A_TEACHER.values():
        assert all(model_family(name.strip()) for name in names.split(","))
        assert not presets or set(presets.split(", ")) <= PRESETS.keys()
    assert {name for names in ALONE.values() if names for name in names.split(", ")} <= PRESETS.keys()
    assert "…" not in said  # whole names at 80 columns
    assert "mobilenetv3_small_100" in "".join(said.split())
