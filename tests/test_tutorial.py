"""docs/tutorial.md does what it says: its commands on a small folder and a small student, and its script as it stands."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rob import cli
from rob.student_train.checkpoint import export_weights
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.tiny import tiny_images

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
SMALLER = {
    "pack": ("--workers", "1"),
    "finetune": ("--epochs", "1", "--device", "cpu", "--workers", "1"),
    "export": ("--workers", "1", "--min-agreement", "0"),
}
"""What makes a command quick, and keeps what one epoch on two photographs comes to."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_ends_with_a_script_that_names_a_class(tmp_path, monkeypatch):
    """Caching and training are README's, whose test runs them; here their student is drawn."""
    for part, seed in (("train", 0), ("val", 1)):
        tiny_images(tmp_path / "photos" / part, 8, 48, seed)
    shutil.copy(tmp_path / "photos" / "val" / "class0" / "00000.jpg", tmp_path / "photo.jpg")
    student = StudentConfig("test_resnet", 32, small_images=False)
    torch.manual_seed(0)
    export_weights(build_student(student), describe_student(student), tmp_path / "runs/student/student.safetensors")
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("sh")).splitlines():
        rob, name, *words = line.split()
        if rob == "rob" and name in SMALLER:
            monkeypatch.setattr(sys, "argv", ["rob", name, *words, *SMALLER[name]])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert end.value.code == 0, line
    (script,) = blocks("python")
    assert len([line for line in script.splitlines() if line]) <= 10
    (tmp_path / "classify.py").write_text(script)
    words = "".join(blocks("sh")).splitlines()[-1].split()
    child = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
    assert child.stdout in ("class0\n", "class1\n"), child.stderr
