"""What a run leaves is checked when it is read: a damaged file is named, and nothing is read or written through a link."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rob.common.errors import FailureError, MisuseError
from rob.common.records import DamagedError, sealed
from rob.common.weights import read_tensor_file
from rob.student_train.begun import read_begun
from rob.student_train.checkpoint import export_weights, load_checkpoint, load_student, save_checkpoint
from rob.student_train.evaluate.features import FeatureKey, cached_features
from rob.student_train.evaluate.results import read_results, write_result
from rob.student_train.evaluate.yardstick import Outcome, record
from rob.student_train.export.onnx_file import check_onnx, save_onnx
from rob.student_train.run_folder import RunFolder, read_log
from rob.student_train.students import StudentConfig, build_student, describe_student
from support import tiny
from support.training import log_line

KEY = FeatureKey("weights", "data", 32)
CONFIG = {"lr": 0.1, "scales": (0.05, 0.25)}
STATE = {"weights": torch.arange(300.0), "step": 3, "random": (1, "a")}


def write_checkpoint(folder: Path) -> Path:
    save_checkpoint(folder / "checkpoint.pt", STATE, CONFIG)
    return folder / "checkpoint.pt"


def write_weights(folder: Path) -> Path:
    config = StudentConfig("test_resnet", 32, True)
    torch.manual_seed(0)
    export_weights(build_student(config), describe_student(config), folder / "student.safetensors")
    return folder / "student.safetensors"


def write_results(folder: Path) -> Path:
    return write_result(folder, "knn", {"top1": 61.25, "weights": "abc", "train": "a.beton"})


def write_log(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_bytes(log_line(step=1) + log_line(step=2, loss=0.5))
    return folder / "metrics.jsonl"


def write_onnx(folder: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    image, features = (onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("image", "features"))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["image"], ["features"])], "g", [image], [features]
    )
    save_onnx(onnx.helper.make_model(graph), {"rob": "{}", "name": "tiny"}, folder / "student.onnx")
    return folder / "student.onnx"


def read_onnx(path: Path) -> Any:
    try:
        return check_onnx(path)
    except DamagedError as problem:
        raise MisuseError(f"{path} {problem}") from None


def read_checkpoint(path: Path) -> Any:
    state = load_checkpoint(path, CONFIG)
    return {**state, "weights": state["weights"].tolist()}


def read_weights(path: Path) -> Any:
    backbone, info = load_student(path)
    return info, {name: tensor.tolist() for name, tensor in backbone.state_dict().items()}


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "weights": (write_weights, read_weights),
    "result": (write_results, lambda path: read_results(path.parents[1])),
    "log": (write_log, lambda path: read_log(path.parent)),
    "exported ONNX": (write_onnx, read_onnx),
}


WRITTEN: dict[str, tuple[Path, Any]] = {}


def written(kind: str, factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A whole file of the kind, and what is read from it; made once."""
    if kind not in WRITTEN:
        write, read = KINDS[kind]
        path = write(factory.mktemp(kind))
        WRITTEN[kind] = path, read(path)
    return WRITTEN[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(draw=st.data())
def test_no_damage_is_silent(tmp_path_factory, kind, draw):
    """A flipped bit anywhere: the same comes out, where only room between was hit, or one sentence naming the file."""
    _, read = KINDS[kind]
    kept, whole = written(kind, tmp_path_factory)
    path = shutil.copytree(kept.parents[kind == "result"], tmp_path_factory.mktemp("run"), dirs_exist_ok=True)
    path = path / kept.relative_to(kept.parents[kind == "result"])
    content = bytearray(path.read_bytes())
    content[draw.draw(st.integers(0, len(content) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        assert read(path) == whole or (kind == "log" and read(path) == whole[:1])  # the last line's end: it was cut
    except (MisuseError, FailureError) as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", KINDS)
@given(content=st.binary(max_size=300))
def test_whatever_lies_there_is_one_sentence(tmp_path_factory, kind, content):
    kept, _ = written(kind, tmp_path_factory)
    path = tmp_path_factory.mktemp("run") / kept.relative_to(kept.parents[kind == "result"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content + b"\n")
    read = KINDS[kind][1]
    with pytest.raises((MisuseError, FailureError), match=r"^[^\n]*$"):
        read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_and_an_endless_device_are_not_read(tmp_path, kind):
    write, read = KINDS[kind]
    path = write(tmp_path)
    for make in (os.mkfifo, lambda place: os.symlink("/dev/zero", place)):
        path.unlink()
        make(path)
        with pytest.raises((MisuseError, FailureError, OSError)):
            read(path)


@given(draw=st.data())
def test_damaged_features_are_extracted_again(tmp_path_factory, draw):
    folder, rows = tmp_path_factory.mktemp("run"), torch.arange(8.0).view(4, 2)
    cached_features(folder, KEY, 4, lambda start, stop: rows[start:stop])
    (shard,) = KEY.folder(folder).iterdir()
    content = bytearray(shard.read_bytes())
    content[draw.draw(st.integers(0, len(content) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    shard.write_bytes(content)
    assert torch.equal(cached_features(folder, KEY, 4, lambda start, stop: rows[start:stop]), rows)
    assert torch.equal(cached_features(folder, KEY, 4, lambda start, stop: pytest.fail("extracted twice")), rows)


def test_weights_from_before_checksums_say_what_to_do(tmp_path):
    path = write_weights(tmp_path)
    save_file(load_file(path), path, {"student": "{}"})
    with pytest.raises(MisuseError, match=r"has no checksum.*run it again in the same folder, and from its checkpoint"):
        load_student(path)


def test_a_damaged_result_is_replaced_and_said(tmp_path):
    path = write_results(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"61", b"16"))
    with pytest.raises(MisuseError, match=r"knn\.json is damaged or was edited: .* delete it and evaluate again"):
        read_results(tmp_path)
    said: list[str] = []
    write_result(tmp_path, "knn", {"top1": 50.0}, said.append)
    assert "knn.json is damaged or was edited: its checksum does not match: it is replaced" in said[0]
    assert read_results(tmp_path)["knn"]["top1"] == 50.0


@pytest.mark.parametrize("content", [{"top1": "61"}, {"results": {"labels": 1}}, {"box": [1]}])
def test_a_result_of_another_form_is_one_sentence(tmp_path, content):
    path = write_results(tmp_path)
    path.write_bytes(sealed(content))
    with pytest.raises(MisuseError, match=r"knn\.json says .*, which it cannot be: delete it and evaluate again"):
        read_results(tmp_path)


# ---- the run folder ----


def open_run(out: Path) -> RunFolder:
    settings = {"out": out, "log_every": 1, "loader": {"batch_size": 4}}
    return RunFolder(out, settings, {}, total_steps=10, on_log=lambda line, total: None)


def advance(run: RunFolder, steps: int) -> None:
    from rob.common.timing import Stopwatch

    stopwatch = Stopwatch(torch.device("cpu"))
    for step in range(1, steps + 1):
        run.log(step, 0, torch.tensor([1.0, 2.0]), 0.1, images=4, stopwatch=stopwatch)


def trained(out: Path, steps: int = 4) -> dict[str, Any]:
    state = {"model": torch.nn.Linear(2, 2)}
    run = open_run(out)
    run.resume(state, torch.device("cpu"))
    advance(run, steps)
    run.save(state, steps)
    run.close()
    return state


def test_a_folder_that_is_moved_away_is_not_made_anew(tmp_path):
    state, run = {"model": torch.nn.Linear(2, 2)}, open_run(tmp_path / "run")
    run.resume(state, torch.device("cpu"))
    advance(run, 2)
    (tmp_path / "run").rename(tmp_path / "away")
    for act in (lambda: run.save(state, 2), lambda: advance(run, 1)):
        with pytest.raises(
            FailureError, match=r"run was moved or deleted while its run went on: put it back, or start"
        ):
            act()
        assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    run.save(state, 2)
    run.close()


def test_the_log_is_on_disk_before_the_checkpoint_that_relies_on_it(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    trained(tmp_path)
    names = [Path(name).name for name in synced]
    assert names.index("metrics.jsonl") < names.index("checkpoint.pt.tmp")


def test_a_log_that_was_cut_is_said_when_the_run_goes_on(tmp_path):
    state = trained(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
    again = open_run(tmp_path)
    assert again.resume(state, torch.device("cpu")) == 4
    assert again.notes == [f"{tmp_path / 'metrics.jsonl'} has lost 2 of the 4 lines up to step 4"]
    again.close()


def test_a_log_that_is_damaged_during_a_run_costs_no_checkpoint(tmp_path):
    state, run = {"model": torch.nn.Linear(2, 2)}, open_run(tmp_path)
    run.resume(state, torch.device("cpu"))
    advance(run, 2)
    (tmp_path / "metrics.jsonl").write_bytes(b"{}\n")
    run.save(state, 2)
    run.close()
    assert load_checkpoint(tmp_path / "checkpoint.pt", run._fixed)["lines"] == 2


def test_a_checkpoint_of_something_else_is_one_sentence(tmp_path):
    trained(tmp_path)
    with pytest.raises(
        FailureError, match=r"checkpoint\.pt is not of this run, or of another rob .*delete it to start"
    ):
        open_run(tmp_path).resume({"model": torch.nn.Linear(3, 2)}, torch.device("cpu"))
    with pytest.raises(FailureError, match=r"checkpoint\.pt is not of this run"):
        open_run(tmp_path).resume({"other": torch.nn.Linear(2, 2)}, torch.device("cpu"))


def test_a_run_from_before_checksums_goes_on_and_has_them_then(tmp_path):
    state, names = trained(tmp_path), ("config.json", "metrics.jsonl")
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(re.sub(rb',?\s*"crc32c": "[0-9a-f]{8}"', b"", content))
    with pytest.raises(FailureError, match=r"line 1 has no checksum.*: run the same command again"):
        read_log(tmp_path)
    begun = read_begun(tmp_path)
    assert begun is not None and begun["loader"] == {"batch_size": 4}
    again = open_run(tmp_path)
    assert again.resume(state, torch.device("cpu")) == 4
    again.close()
    assert {name: (tmp_path / name).read_bytes() for name in names} == whole
    (tmp_path / "config.json").write_bytes(whole["config.json"].replace(b": 4", b": 8"))
    with pytest.raises(FailureError, match=r"config\.json is damaged or was edited"):
        read_begun(tmp_path)


def test_the_course_of_a_run_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "knn.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"knn\.jsonl"):
        record(tmp_path, 1, 2, Outcome(True, 50, 1.0, 2.0, 3.0, None))
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["checkpoint.pt.tmp", "config.json.tmp", "metrics.jsonl.tmp", "train.log.tmp", "metrics.jsonl", ".lock"]
)
def test_nothing_is_written_through_a_planted_link(tmp_path, name):
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    out.mkdir()
    (out / name).symlink_to(victim)
    try:
        trained(out)
    except OSError as error:
        assert name in (".lock", "metrics.jsonl"), error
    assert victim.read_text() == "precious"


def test_two_processes_writing_one_file_do_not_mix(tmp_path):
    from rob.common.files import replacing

    with (
        tiny.locked_by_another_process(tmp_path / "a.json.tmp"),
        pytest.raises(FailureError, match=r"cannot write .*a\.json: another process is writing it"),
        replacing(tmp_path / "a.json") as file,
    ):
        file.write(b"mine")
    assert not (tmp_path / "a.json").exists()
    with replacing(tmp_path / "a.json") as file:  # what a killed process left is in nobody's way
        file.write(b"mine")
    assert (tmp_path / "a.json").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_same_weights_are_the_same_bytes_in_every_process(tmp_path):
    script = (
        "import sys, torch; from rob.common.weights import tensor_file; "
        "sys.stdout.buffer.write(tensor_file({'b': torch.ones(3), 'a': torch.zeros(2, 2)}, {k: k for k in 'qwertz'}))"
    )
    words, found = [sys.executable, "-c", script], set()
    for seed in ("0", "1"):  # of the hashes that order a set
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.run(words, capture_output=True, check=True, env=environment).stdout)
    assert len(found) == 1
    (tmp_path / "a.safetensors").write_bytes(found.pop())
    assert set(load_file(tmp_path / "a.safetensors")) == {"a", "b"}
    assert read_tensor_file(tmp_path / "a.safetensors")[1] == {k: k for k in "qwertz"}
