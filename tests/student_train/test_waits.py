"""What would make the host wait for a GPU in a step of training. There is none here: the places are read."""

import ast
from collections import Counter
from copy import deepcopy

import torch
from test_structure import ROOT
from torch import nn

from rob.common.pace import Pace
from rob.student_train.config import OptimiserConfig
from rob.student_train.kernels.topk import _on_device
from rob.student_train.optimiser import build_average, build_optimiser, clip_gradients
from rob.student_train.targets.momentum import move_towards
from support.launches import Operations

STEP = (
    "student_train/trainer.py",
    "student_train/crops.py",
    "student_train/student_with_head.py",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "student_train/objectives").glob("*.py")),
    *(f"student_train/targets/{name}.py" for name in ("dense", "momentum", "online", "with_copy")),
    *(f"student_train/kernels/{name}.py" for name in ("topk", "target", "sinkhorn", "entropy", "chunked", "triton_ce")),
    *(f"common/views/{name}.py" for name in ("batch", "colours", "kernel")),
    "common/teacher.py",
    "common/heads.py",
    "common/batchnorm.py",
)
WAITING = {"item", "tolist", "cpu", "new_tensor", "numpy"}
"""Methods of a tensor that wait for it, or copy to the device while the host waits."""
ONCE = {
    ("student_train/crops.py", "__init__"),
    ("common/teacher.py", "_views"),
    ("student_train/targets/momentum.py", "_mean_and_std"),
    ("common/views/colours.py", "_channel_offsets"),
    ("student_train/kernels/topk.py", "_on_device"),
    ("common/views/batch.py", "_augmented"),
}
"""(file, function) that makes constants on the device, once a run, or finds there what was copied before."""


def places(path: str):
    """(function, line) of each call in ``path`` that waits."""
    for function in ast.walk(ast.parse((ROOT / path).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, words = node.func.attr, {word.arg for word in node.keywords}
            to_another = any(isinstance(word, ast.Attribute) and word.attr == "device" for word in node.args)
            copies = name == "to" and to_another and "non_blocking" not in words
            if name in WAITING or copies or (name == "tensor" and "device" in words):
                yield function.name, node.lineno


def test_nothing_in_a_step_waits():
    """What is made once is found, so the reading is known to see such calls."""
    found = {(path, name): line for path in STEP for name, line in places(path)}
    assert found.keys() == ONCE, found


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


def test_average_lars_and_clipping_reach_all_weights_in_few_launches():
    """By what torch does to many tensors at once, which it takes by itself on a GPU."""
    network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])
    average, launched = build_average(network, 0.9), Counter()
    with Operations(launched):
        average.update(network, 1)
    assert launched == {"_foreach_lerp_": 1}
    weights = []
    for together in (False, True):
        moved = deepcopy(network)
        optimiser = build_optimiser(moved, OptimiserConfig("lars", weight_decay=1e-4), 256)
        for group in optimiser.param_groups:
            assert group["foreach"] is None  # where it can
            group["foreach"] = together
        launched.clear()
        for parameter in moved.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        with Operations(launched):
            optimiser.step()
        assert (launched.total() < 40) == together, launched
        weights.append(torch.cat([parameter.flatten() for parameter in moved.parameters()]))
    torch.testing.assert_close(*weights)
    launched.clear()
    with Operations(launched):
        clip_gradients([*moved.parameters()], 1e-3, each=True)
    assert launched.total() < 10, launched


def test_the_host_is_three_steps_ahead_at_most(monkeypatch):
    said = []

    class Event:
        def __init__(self, blocking):
            self.number = sum(word == "launched" for word, _ in said)

        def record(self):
            said.append(("launched", self.number))

        def synchronize(self):
            said.append(("waited for", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = Pace(torch.device("cuda"))
    for _ in range(5):
        pace.step_done()
    waits = [("waited for", 0), ("launched", 3), ("waited for", 1), ("launched", 4)]
    assert said == [("launched", 0), ("launched", 1), ("launched", 2), *waits]
    Pace(torch.device("cpu")).step_done()
    assert len(said) == 7
