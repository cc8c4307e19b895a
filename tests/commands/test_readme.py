"""README's first path, verbatim, with a small model in the teacher's place and a plan of few steps; the words of all others."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.core import TyperGroup
from typer.main import get_command

from rob import cli
from rob.student_train import planner
from support.tiny import TEACHER, tiny_images

README = Path(__file__).parents[2] / "README.md"
TEXTS = [README, *sorted((README.parent / "docs").glob("*.md"))]
PUBLISHED = "--teacher vit_small_patch16_224.dino"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands() -> list[str]:
    """Of the first block that packs."""
    block = next(block for block in blocks("sh") if "\nrob pack photos/" in block)
    return [line.partition("  #")[0] for line in block.splitlines() if line.startswith("rob ")]


@pytest.mark.slow
def test_the_first_path_works_word_for_word(rob, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_images(tmp_path / "photos", 60, size=64)
    for part, number in (("train", 24), ("test", 8)):
        tiny_images(tmp_path / "labelled" / part, number, seed=number)
    shutil.copy(made.checkpoint, "teacher.safetensors")
    monkeypatch.setattr(planner, "LEAST_STEPS", 2)
    monkeypatch.setitem(planner.EFFORTS, "minutes", planner.Effort(1, 2, 1, "a test"))
    listed = commands()
    assert [words.split()[1] for words in listed] == ["pack", "cache-teacher", "train-student", "pack", "pack", "eval"]
    assert PUBLISHED in listed[1]
    for line in listed:
        words = line.replace(PUBLISHED, f"--teacher {TEACHER} --checkpoint teacher.safetensors --view-size 32")
        outcome = rob(*shlex.split(words)[1:])
        assert outcome.code == 0, (line, outcome.err)
        if "train-student" in line:
            assert "chosen, unless you give it" in outcome.out
            assert "did it work?" in outcome.out
            assert "random start" in outcome.out
    assert "k-NN of mobilenetv3_small_100" in outcome.out
    shutil.rmtree("targets.zarr")
    python, onnx = blocks("python")
    small = {
        'TeacherConfig("vit_small_patch16_224.dino")': f'TeacherConfig("{TEACHER}", Path("teacher.safetensors"))',
        "rob.CacheConfig(data, store, ": "rob.CacheConfig(data, store, view_size=32, teacher=",
        'StudentConfig("resnet18")': 'StudentConfig("test_resnet", 32)',
    }
    for published, ours in small.items():
        assert published in python
        python = python.replace(published, ours)
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["backbone"](torch.zeros(1, 3, 32, 32)).shape == (1, names["backbone"].num_features)
    assert rob("export", "runs/r18", "--to", "onnx").code == 0
    shutil.copy(next(Path("photos").rglob("*.jpg")), "photo.jpg")
    assert "(224, 224)" in onnx
    assert "student.int8.onnx" in onnx  # which agrees too little after two steps
    names |= {"Image": Image, "ImageOps": ImageOps, "np": np, "onnxruntime": pytest.importorskip("onnxruntime")}
    exec(onnx.replace("(224, 224)", "(32, 32)").replace(".int8", ""), names)
    assert names["features"].shape == (1, names["backbone"].num_features)


def test_every_command_of_a_text_has_the_words_that_are_there():
    found, application = 0, get_command(cli.app)
    for text in TEXTS:
        for block in re.findall(r"```sh\n(.*?)```", text.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if line.startswith("rob ") and " ..." not in line else []
                command = application
                while isinstance(command, TyperGroup) and words:
                    words = words[1:]
                    assert words[0] in command.commands, (text.name, line)
                    command = command.commands[words[0]]
                if words:
                    found += 1
                    try:
                        command.make_context(words[0], words[1:])
                    except Exception as error:  # what the parser refuses has no public class
                        pytest.fail(f"{text.name}: {line}: {error}")
    assert found > 20
