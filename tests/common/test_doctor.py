"""``rob doctor``: what is there and what is not, by what the installed package asks for, and what brings it."""

import sys

import pytest

from rob.common import doctor
from rob.common.commands import doctor as command
from rob.common.errors import FailureError

STATED = [
    "torch>=2.11",
    "numpy>=2.0",
    'ffcv==1.0.2; sys_platform == "linux" and extra == "ffcv"',
    'onnx>=1.20; extra == "export"',
    'onnxruntime>=1.24; extra == "export"',
    'plotly>=6.1; extra == "report"',
    'notfor>=1; sys_platform == "nowhere" and extra == "export"',
]
THERE = {"torch": "2.14.1", "numpy": "2.4.0", "onnx": "1.20.0", "onnxruntime": "1.1", "plotly": "6.1", "rob": "0.1.0"}


@pytest.fixture
def installed(monkeypatch):
    """A machine with these packages, to be changed."""
    there = dict(THERE)
    monkeypatch.setattr(doctor, "_stated", lambda: STATED)
    monkeypatch.setattr(doctor, "installed", there.get)
    return there


def test_what_is_missing_or_too_old_is_named_by_extra(installed):
    found = {extra.name: extra.missing for extra in doctor.extras()}
    assert found == {"": (), "ffcv": ("ffcv==1.0.2",), "export": ("onnxruntime>=1.24",), "report": ()}


def test_it_says_what_brings_it_and_fails_without_what_rob_needs(installed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rob.common.views.ffcv_import", None)
    command()
    said = " ".join(capsys.readouterr().out.split())
    assert "rob 0.1.0" in said and "Pillow in worker processes" in said
    assert "in rob's folder, pip install -c constraints.txt -e '.[NAME]' brings one of them" in said
    assert "make venv brings ffcv" in said
    del installed["numpy"]
    with pytest.raises(FailureError, match=r"rob lacks numpy>=2.0: pip install"):
        command()


def test_the_version_is_an_option(monkeypatch, capsys):
    from rob import __version__, cli

    monkeypatch.setattr(sys, "argv", ["rob", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0, capsys.readouterr().out) == (0, f"rob {__version__}\n")
