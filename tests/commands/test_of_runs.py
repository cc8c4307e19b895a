"""A student of the user's own code on the command line: named once to train, and again by each command that takes the run."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from rob.common import factories
from support.cli import FAST

MODULE = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
def detector():
    network = nn.Module()
    network.backbone, network.head = build(), nn.Linear(16, 4)
    return network
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """In the folder that the commands run in; nothing is named at first."""
    (tmp_path / "nets_of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(factories, "_named", {})
    yield
    sys.modules.pop("nets_of_a_user", None)


def test_every_command_that_takes_a_run_wants_its_network_named(rob, refused, made, tmp_path, monkeypatch):
    named, run = ("--student", "nets_of_a_user:build"), tmp_path / "run"
    train = (made.data, "--targets", made.store, *named, "--image-size", 32, "--hidden-dim", 16, "--epochs", 1)
    trained = rob("train-student", *train, "--batch-size", 8, *FAST, "--out", run)
    assert (trained.code, "8 of 9 tensors" in trained.out, "trained: 9 of 9 tensors (0, 1, 3)" in trained.out) == (
        0,
        False,
        True,
    )

    def forget():
        monkeypatch.setattr(factories, "_named", {})
        sys.modules.pop("nets_of_a_user", None)

    forget()
    measured = ("knn", run, made.data, "--k", 2, "--size", 32, *FAST)
    refused(
        2,
        r"run/student.safetensors: its network is nets_of_a_user:build.*pass --student nets_of_a_user:build",
        "eval",
        *measured,
    )
    refused(2, r"--student resnet18 is no package.module:factory", "eval", *measured, "--student", "resnet18")
    assert "nets_of_a_user" not in sys.modules  # a file's word is not enough
    assert rob("eval", *measured, *named).code == 0
    forget()
    assert rob("embed", run, made.data, "features.npy", *named, *FAST).code == 0
    assert np.load("features.npy").shape == (24, 16)
    forget()
    tuned = ("finetune", "classify", run, made.data, "--val", made.data, "--epochs", 1, "--out", "tuned", *FAST)
    assert rob(*tuned, "--batch-size", 8, *named).code == 0
    assert {"head.weight", "backbone.model.0.weight"} <= load_file("tuned/classifier.safetensors").keys()
    forget()
    refused(2, r"its network is nets_of_a_user:build", "compare", run)


def test_a_layer_of_a_whole_detector(rob, refused, made, tmp_path):
    train = ("train-student", made.data, "--targets", made.store, "--image-size", 32, "--hidden-dim", 16, "--epochs", 1)
    train = (*train, "--batch-size", 8, *FAST, "--out", tmp_path / "run", "--student", "nets_of_a_user:detector")
    refused(2, r"has no|makes no features.*--student-features; it has backbone, head", *train)
    refused(
        2,
        r"unknown layer of student nets_of_a_user:detector 'backbon'.*backbone",
        *train,
        "--student-features",
        "backbon",
    )
    trained = rob(*train, "--student-features", "backbone", "--student-mean", "0.5,0.5,0.5", "--plan-only")
    assert trained.code == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere_at_all:build", "there is no module nowhere_at_all"), ("nets_of_a_user:buidl", "did you mean build")],
)
def test_a_factory_that_is_not_there(refused, made, tmp_path, name, message):
    words = (made.data, "--targets", made.store, "--epochs", 1, "--batch-size", 8, *FAST)
    refused(2, message, "train-student", *words, "--student", name, "--out", tmp_path / "run")


def test_a_run_is_extended_with_the_settings_that_it_had(rob, refused, made, tmp_path):
    """All that is given again is where it began; the student is of the user's own code, and named."""
    named, parent, child = ("--student", "nets_of_a_user:build"), tmp_path / "parent", tmp_path / "child"
    train = ("train-student", made.data, "--targets", made.store, *FAST)
    first = (
        *train,
        *named,
        "--image-size",
        32,
        "--hidden-dim",
        16,
        "--pairing",
        "same",
        "--epochs",
        1,
        "--batch-size",
        8,
    )
    assert rob(*first, "--out", parent).code == 0
    extend = (*train, "--init", parent, "--extend", 2, "--out", child)
    refused(2, "the student of .*parent is nets_of_a_user:build, of somebody's own code: give it as", *extend)
    refused(2, "--extend 2 goes on with another run", *train, "--extend", 2, "--out", child)
    refused(2, "nowhere has no checkpoint.pt", *train, "--init", "nowhere", "--extend", 2, "--out", child)
    assert rob(*extend, *named).code == 0
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (parent, child))
    assert now["parent"]["run"] == str(parent)
    assert now["epochs"] == 2
    normalised = {name: was["student_info"][name] for name in ("mean", "std")}
    assert now["student"] == {**was["student"], "init": str(parent), **normalised}
    assert {name: now[name] for name in ("objective", "pairing")} == {
        name: was[name] for name in ("objective", "pairing")
    }
    shutil.rmtree(parent)
    assert "is complete already: nothing to do" in rob(*extend, *named).out  # it asks nothing of its parent
