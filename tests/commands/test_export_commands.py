"""rob export, embed and push as they are typed, and their one sentence where they cannot."""

import json

import numpy as np
import pytest
import torch

from rob.student_train.checkpoint import export_weights
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.cli import FAST
from support.tiny import TEACHER

READ = ("--loader", "torch", "--workers", "1")


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    student = StudentConfig("test_vit", 32)
    export_weights(build_student(student), describe_student(student), tmp_path / "run" / "student.safetensors")
    return tmp_path / "run"


@pytest.mark.slow
def test_from_a_run_to_features_of_its_onnx_file(rob, run, made, tmp_path):
    outcome = rob("export", run, "--to", "onnx", "--to", "torch", "--data", made.data, "--images", 16, *READ)
    assert outcome.code == 0, outcome.err
    assert "student.onnx: uint8 image (batch x 32 x 32 x 3) -> features (64)" in outcome.out
    assert [entry["file"] for entry in json.loads((run / "export.json").read_text())["files"]] == [
        "student.onnx",
        "student.pt2",
    ]
    for what, out in ((run, "torch"), (run / "student.onnx", "onnx")):
        assert rob("embed", what, made.data, tmp_path / f"{out}.npy", *FAST).code == 0
    np.testing.assert_allclose(np.load(tmp_path / "onnx.npy"), np.load(tmp_path / "torch.npy"), rtol=1e-3, atol=1e-3)
    assert rob("eval", "knn", run / "student.onnx", made.data, "--k", 1, *FAST).code == 0
    assert (
        "takes 32 px alone: leave --size out"
        in rob("embed", run / "student.onnx", made.data, tmp_path / "x.npy", "--size", 64, *FAST).err
    )
    outcome = rob("push", run, "me/model", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "nothing was sent" in outcome.out
    assert (run / "hub" / "student.onnx").exists()


def test_a_teachers_features_are_embedded(rob, made, tmp_path):
    teacher = ("--teacher", TEACHER, "--checkpoint", made.checkpoint, "--size", 32)
    assert rob("embed", "teacher", made.data, tmp_path / "t.npy", *teacher, *FAST).code == 0
    assert np.load(tmp_path / "t.npy").shape == (24, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onnxx"), "unknown format 'onnxx': did you mean onnx"),
        (("--to", "litert"), r"in an environment of its own, pip install -e '.\[litert\]'"),
        (("--int8",), "--int8 is calibrated on images: give --data"),
        (("--to", "torch", "--int8", "--data", "DATA"), "--int8 is for onnx, executorch, coreml, litert: add one"),
        (("--input", "float"), "unknown input 'float'"),
        (("--size", 33), "cannot take images of 33 x 33 px"),
        (("--out", "DATA"), "is a file: name a folder"),
        (("--data", "nowhere.beton"), "nowhere.beton"),
        (("--opset", 12), "opset"),
    ],
)
def test_export_refuses(rob, refused, run, made, options, message):
    options = tuple(made.data if option == "DATA" else option for option in options)
    if "--opset" in options:  # the parser's own words
        assert rob("export", run, *options).code == 2
        return
    refused(2, message, "export", run, *options, *READ)


def test_export_keeps_what_is_there(refused, run):
    (run / "student.pt2").write_bytes(b"mine")
    refused(2, r"student\.pt2 is there already: pass --overwrite", "export", run, "--to", "torch")


def test_there_is_no_student(refused, tmp_path, made):
    (tmp_path / "empty").mkdir()
    refused(2, "no student.safetensors in .*empty: give a finished run's folder", "export", tmp_path / "empty")
    refused(2, "no student.safetensors in .*empty", "push", tmp_path / "empty", "me/model", "--dry-run")
    refused(2, "no student.safetensors in .*empty", "embed", tmp_path / "empty", made.data, tmp_path / "a.npy", *FAST)


def test_a_file_that_is_no_onnx_of_ours(refused, tmp_path, made):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    for name, message in (
        ("bad", "is no ONNX file of rob export, damaged, or"),
        ("none", "no such file; rob export writes it"),
    ):
        refused(2, message, "embed", tmp_path / f"{name}.onnx", made.data, tmp_path / "a.npy", *FAST)
