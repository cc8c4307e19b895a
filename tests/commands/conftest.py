"""What the tests of commands share: the console script in this process, and what it made of 24 images."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rob import cli
from support.cli import FAST
from support.tiny import TEACHER, tiny_images, tiny_teacher_checkpoint


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def rob(monkeypatch, capsys) -> Callable[..., Outcome]:
    """``rob(*arguments)``: the console script, in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rob", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def refused(rob, tmp_path) -> Callable[..., None]:
    """``refused(code, message, *arguments)``: one sentence that matches, that exit code, and no file made or changed."""

    def check(code: int, message: str, *arguments: object) -> None:
        before = snapshot(tmp_path)
        outcome = rob(*arguments)
        assert re.search(message, outcome.err), outcome.err
        assert outcome.code == code
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert "Traceback" not in outcome.out + outcome.err
        assert snapshot(tmp_path) == before

    return check


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Made:
    """What the commands made of 24 images in two classes. Not to be changed."""

    images: Path
    data: Path
    checkpoint: Path
    store: Path

    @property
    def cache(self) -> tuple:
        """Arguments of ``rob cache-teacher`` behind DATA and OUT."""
        return ("--teacher", TEACHER, "--checkpoint", self.checkpoint, "--view-size", 32, "--views", 2, *FAST)

    @property
    def train(self) -> tuple:
        """Arguments of ``rob train-student``, but --out and what is under test."""
        return self.train_on(self.store)

    def train_on(self, targets: object) -> tuple:
        """The same on other ``targets``."""
        student = ("--student", "test_resnet", "--no-small-images", "--image-size", 32, "--hidden-dim", 16)
        return (self.data, "--targets", targets, *student, "--epochs", 1, "--batch-size", 8, *FAST)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    made = Made(
        tiny_images(folder / "images", 24), folder / "data.beton",
        tiny_teacher_checkpoint(folder).checkpoint, folder / "targets.zarr",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (
            ("pack", made.images, made.data, "--workers", 1),
            ("cache-teacher", made.data, made.store, *made.cache),
        ):
            patch.setattr(sys, "argv", ["rob", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert not ended.value.code
    return made
