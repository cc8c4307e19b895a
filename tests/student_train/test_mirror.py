"""A run at an address: trained here and there, killed at any moment, it is the run of a folder."""

import json
from pathlib import Path

import pytest

from rob.common.bucket import Bucket
from rob.common.errors import MisuseError
from rob.common.places import place_of
from rob.student_train.commands.of_runs import at_hand
from rob.student_train.mirror import LAST, RECORD, Mirror
from rob.student_train.report.config import ReportConfig
from rob.student_train.train import TrainProgress, train_student
from support.training import small_run

pytest.importorskip("obstore")


def test_a_run_goes_on_on_another_machine(data, store, tmp_path, monkeypatch):
    """Killed while its second checkpoint is copied, of which the log is there and the weights are not."""
    train_student(small_run(data.path, store, tmp_path / "run", epochs=2))
    at = small_run(data.path, store, Path("memory://machines/run"), epochs=2)
    written, write = [], Bucket.write

    def killed(self, name, content):
        written.append(name)
        if written.count("checkpoint.pt") >= 2:
            raise KeyboardInterrupt
        write(self, name, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bucket, "write", killed)
        train_student(at_machine(at, tmp_path / "here"))
    assert written.index("metrics.jsonl") < written.index("checkpoint.pt")
    steps = []
    told = TrainProgress(step=lambda done, _: steps.append(done))
    result = train_student(at_machine(at, tmp_path / "there"), told)
    assert steps[0] == 3  # of 6: the first checkpoint's
    place = place_of("memory://machines/run")
    for name in ("student.safetensors", "checkpoint.pt"):
        assert place.read(name) == (result.weights.parent / name).read_bytes()
    assert place.read("student.safetensors") == (tmp_path / "run" / "student.safetensors").read_bytes()
    assert not [name for name in place.names() if name.startswith(".") or str(tmp_path) in name]


def at_machine(config, local_dir: Path):
    from dataclasses import replace

    return replace(config, local_dir=local_dir)


def test_a_bucket_that_takes_nothing_is_told_before_the_first_step(data, store, tmp_path, monkeypatch):
    def refused(self, name, content):
        raise MisuseError("no rights")

    monkeypatch.setattr(Bucket, "write", refused)
    steps = []
    at = at_machine(small_run(data.path, store, Path("memory://locked/run"), epochs=1), tmp_path)
    with pytest.raises(MisuseError, match="no rights"):
        train_student(at, TrainProgress(step=lambda done, _: steps.append(done)))
    assert steps == []


def test_the_folder_counts_while_nobody_else_wrote(tmp_path):
    mirror = Mirror.of("memory://counts/run", tmp_path)
    assert mirror is not None
    mirror.pull()
    for name in ("log", *LAST):
        (mirror.folder / name).write_text("1")
    mirror.push()
    (mirror.folder / "log").write_text("2")  # the bucket was lost before this was copied
    mirror.pull()
    assert (mirror.folder / "log").read_text() == "2"
    place = place_of("memory://counts/run")
    place.write("log", b"3")
    mirror.pull()
    assert (mirror.folder / "log").read_text() == "3"
    assert json.loads((mirror.folder / RECORD).read_text()).keys() == {"log", *LAST}

    reading = Mirror.of("memory://counts/run", tmp_path, kind="read")
    assert reading is not None
    reading.pull_some("checkpoint.pt")
    assert sorted(path.name for path in reading.folder.iterdir()) == sorted({RECORD, "log", *LAST[1:]})
    (reading.folder / "new").write_text("4")
    reading.push()
    assert place.read("new") == b"4"
    place.remove("log")
    reading.pull_some("checkpoint.pt")
    assert not (reading.folder / "log").exists()


def test_commands_get_copies_of_the_runs_that_they_name(tmp_path, monkeypatch):
    """One or several, among their own parameters and in a configuration."""
    monkeypatch.setenv("ROB_LOCAL_DIR", str(tmp_path))
    for name in ("one", "two"):
        for file in ("student.safetensors", "checkpoint.pt"):
            place_of(f"memory://copies/{name}").write(file, name.encode())
    one, two = Path("memory:/copies/one"), Path("memory:/copies/two")
    options, mirrors = at_hand({"runs": [one, tmp_path, two], "config": ReportConfig((two,)), "out": one})
    assert list(map(str, mirrors)) == ["memory://copies/one", "memory://copies/two", "memory://copies/two"]
    copies = [options["runs"][0], options["runs"][2], *options["config"].runs]
    assert [(copy / "student.safetensors").read_text() for copy in copies] == ["one", "two", "two"]
    assert not any((copy / "checkpoint.pt").exists() for copy in copies)
    assert (options["runs"][1], options["out"]) == (tmp_path, one)
    options, _ = at_hand({"what": "memory://copies/one"}, training=True)
    assert (Path(options["what"]) / "checkpoint.pt").read_text() == "one"


def test_what_is_no_run_there_is_refused(tmp_path):
    assert Mirror.of(tmp_path) is None
    assert Mirror.of("file:///runs/first") is None
    with pytest.raises(MisuseError, match="an address of s3:// must hold no key"):
        Mirror.of("s3://key:secret@b/run", tmp_path)
    none = Mirror.of("memory://none/run", tmp_path)
    assert none is not None
    with pytest.raises(
        MisuseError, match="there is no run at memory://none/run: give the `out` of a rob train-student"
    ):
        none.pull_some()
