"""What would make the host wait for a GPU in a step of training. There is none here: the places are read."""

import ast

import pytest
import torch
from test_structure import ROOT

from rob.student_train.kernels.topk import _on_device
from rob.student_train.targets.momentum import move_towards

STEP = (
    "student_train/trainer.py",
    "student_train/crops.py",
    "student_train/student_with_head.py",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "student_train/objectives").glob("*.py")),
    *(f"student_train/targets/{name}.py" for name in ("momentum", "online", "with_copy")),
    *(f"student_train/kernels/{name}.py" for name in ("topk", "target", "sinkhorn", "entropy", "chunked", "triton_ce")),
    *(f"common/views/{name}.py" for name in ("batch", "colours", "kernel")),
    "common/teacher.py",
    "common/heads.py",
)
WAITING = {"item", "tolist", "cpu", "new_tensor", "numpy"}
"""Methods of a tensor that wait for it, or copy to the device while the host waits."""
ONCE = {
    ("student_train/crops.py", "__init__"),
    ("common/teacher.py", "embedder"),
    ("common/views/colours.py", "_channel_offsets"),
    ("student_train/kernels/topk.py", "_on_device"),
}
"""(file, function) that makes constants on the device, once a run."""


def places(path: str):
    """(function, line) of each call in ``path`` that waits."""
    for function in ast.walk(ast.parse((ROOT / path).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, words = node.func.attr, {word.arg for word in node.keywords}
            if name in WAITING or (name == "tensor" and "device" in words):
                yield function.name, node.lineno


@pytest.mark.parametrize("path", STEP)
def test_nothing_in_a_step_waits(path):
    assert [(name, line) for name, line in places(path) if (path, name) not in ONCE] == []


def test_what_is_made_once_is_found():
    """So that the reading is known to see such calls."""
    assert {(path, name) for path in STEP for name, _ in places(path)} == ONCE


def test_a_constant_is_copied_once():
    first = _on_device((1.0, 2.0), torch.float32, torch.device("cpu"))
    assert _on_device((1.0, 2.0), torch.float32, torch.device("cpu")) is first


def test_the_copy_moves_alike_in_one_launch_or_in_many(monkeypatch):
    slow, fast = ([torch.randn(3, 5), torch.randn(7)] for _ in range(2))
    expected = [0.9 * a + 0.1 * b for a, b in zip(slow, fast, strict=True)]
    plain, together = ([t.clone() for t in slow] for _ in range(2))
    move_towards(plain, fast, 0.9)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    move_towards(together, fast, 0.9)
    for found in (plain, together):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
