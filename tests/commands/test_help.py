"""Help that is instant, and what the parser refuses."""

import subprocess
import sys

import pytest

COMMANDS = [
    "",
    "pack",
    "cache-teacher",
    "train-student",
    "eval",
    "eval knn",
    "eval linear",
    "eval lowshot",
    "eval transfer",
    "eval detect",
    "compare",
    "sweep",
    "views",
    "inspect",
    "verify",
    "check",
    "demo",
    "bench",
    "teachers",
]


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
print(*sorted({{"torch", "numpy", "timm", "zarr", "numba", "ffcv", "PIL", "matplotlib"}} & sys.modules.keys()))
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (child.stdout, child.stderr) == ("\n", "")


@pytest.mark.parametrize("arguments", [("pak",), ("pack", "--jpeg-quality", "101", "a", "b"), ("train-student",)])
def test_what_the_parser_refuses_is_exit_code_2(rob, arguments):
    outcome = rob(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
