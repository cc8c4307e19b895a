"""Whether a run worked: against its random start, by labels or by the teacher's neighbours, and a warning that names a remedy."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from rob.common.errors import MisuseError
from rob.common.records import read_record
from rob.student_train import train
from rob.student_train.checkpoint import load_student
from rob.student_train.evaluate import yardstick as module
from rob.student_train.evaluate.rank import rank_me
from rob.student_train.evaluate.yardstick import (
    Outcome,
    Yardstick,
    shared_neighbours,
    usable_labels,
    verdict,
    write_outcome,
)
from rob.student_train.students import build_student
from rob.student_train.targets.cached import Cached
from rob.student_train.train import TrainProgress, train_student
from support.training import CPU, LOADER, STEPS_PER_EPOCH, STUDENT, log_of

NO_TEACHER = SimpleNamespace(stores=())


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_IMAGES", 10)


def of(data, targets) -> Yardstick | None:
    return Yardstick.of(data, STUDENT, targets, 0, CPU, LOADER)


def test_an_untrained_student_is_its_random_start(data, store):
    torch.manual_seed(0)
    backbone = build_student(STUDENT).train()
    yardstick = of(data, Cached(store.path))
    outcome = yardstick.measure(backbone)
    assert outcome.student == outcome.random
    assert outcome.by_labels
    assert outcome.teacher is not None
    assert not outcome.worked
    assert backbone.training


def test_the_batch_of_a_run_may_be_more_than_fits_at_once(data):
    """It goes through the student in parts, or is many ranks' together."""
    large = Yardstick.of(data, STUDENT, NO_TEACHER, 0, CPU, replace(LOADER, batch_size=1024), or_rank=True)
    assert large is not None
    assert large.loader == replace(LOADER, batch_size=module.BATCH)


def test_without_labels_the_teachers_neighbours_are_the_measure(data, store, monkeypatch):
    monkeypatch.setattr(module, "usable_labels", lambda data, image_ids: None)
    yardstick = of(data, Cached(store.path))
    outcome = yardstick.measure(build_student(STUDENT))
    assert (outcome.by_labels, outcome.teacher) == (False, None)
    assert 0 < outcome.student <= 100
    assert shared_neighbours(yardstick.teacher_rows, yardstick.teacher_rows) == 1
    assert of(data, NO_TEACHER) is None
    by_rank = Yardstick.of(data, STUDENT, NO_TEACHER, 0, CPU, LOADER, or_rank=True).measure(build_student(STUDENT))
    assert (by_rank.by_rank, by_rank.agreement) == (True, None)
    assert by_rank.student == by_rank.rank > 1
    assert by_rank.sentence.startswith(f"RankMe {by_rank.rank:.1f}, random start ")


def test_rank_me_counts_the_directions_that_are_filled():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(64, 8)).Q
    assert rank_me(directions) == pytest.approx(8, abs=1e-3)
    assert rank_me(directions[:, :1] @ torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    assert 1 < rank_me(directions * torch.tensor([1.0] + [0.1] * 7)) < 8


def test_few_images_one_class_or_missing_labels_say_nothing(data, monkeypatch):
    one = SimpleNamespace(labels=np.zeros(100, np.int64))
    assert usable_labels(one, np.arange(100)) is None
    rare = SimpleNamespace(labels=np.array([0] * 97 + [1] * 3))
    assert usable_labels(rare, np.arange(100)) is None
    assert usable_labels(SimpleNamespace(labels=None), np.arange(100)) is None
    some = SimpleNamespace(labels=np.arange(100) % 3 - 1)
    assert usable_labels(some, np.arange(100)) is None
    assert usable_labels(some, np.flatnonzero(some.labels >= 0)) is not None
    monkeypatch.setattr(module, "FEWEST_IMAGES", 25)
    assert of(data, NO_TEACHER) is None


def test_in_the_run_a_line_is_kept_and_the_run_is_what_it_would_have_been(config, tmp_path):
    train_student(config)
    watched = replace(config, out=tmp_path / "watched", knn_every=2)
    train_student(watched)
    lines = [json.loads(line) for line in (watched.out / "knn.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [2, 4]
    assert [line["loss"] for line in log_of(config.out)] == [line["loss"] for line in log_of(watched.out)]
    assert all(line["rank"] >= 1 and 0 <= line["agreement"] <= 100 for line in lines)


def test_a_student_is_measured_against_what_it_began_with(data, config, tmp_path):
    train_student(replace(config, epochs=1))
    began = replace(STUDENT, init=str(config.out / "student.safetensors"))
    student = load_student(config.out)[0]
    outcome = Yardstick.of(data, began, NO_TEACHER, 0, CPU, LOADER).measure(student)
    assert (outcome.start, outcome.before, outcome.worked) == (outcome.student, outcome.student, False)
    assert f", start {outcome.student:.1f}, pixels" in outcome.sentence
    (said,) = verdict(replace(outcome, student=outcome.start - 5, random=1.0), config.out, 10**6, 1, 1.0, 0.0)
    assert said.startswith(f"the student is NO BETTER THAN WHAT IT BEGAN WITH ({outcome.start - 5:.1f} % against ")
    gone = Yardstick.of(data, replace(STUDENT, init=str(tmp_path / "gone")), NO_TEACHER, 0, CPU, LOADER)
    assert gone.measure(student).start is None  # a run that goes on needs it no more


class Scripted(Yardstick):
    """Finds what it is told to find."""

    scores: ClassVar[list[float]] = []

    def measure(self, backbone):
        return Outcome(True, 24, self.scores.pop(0), 1.0, 2.0, None)


@pytest.fixture
def scripted(monkeypatch):
    def script(*scores: float) -> list[str]:
        Scripted.scores = list(scores)
        monkeypatch.setattr(train, "Yardstick", Scripted)
        return []

    return script


def test_the_best_is_kept_and_patience_ends_the_run(config, scripted):
    notes = scripted(10.0, 30.0, 30.0, 20.0)
    patient = replace(config, epochs=6, knn_every=1, patience=2)
    result = train_student(patient, TrainProgress(note=notes.append))
    assert result.steps == 4 * STEPS_PER_EPOCH
    assert "ends after epoch 4: 2 measurements were no better" in notes
    best = config.out / "student_best.safetensors"
    assert notes[-1] == f"{best}: the student of epoch 2, 30.0, where the last has 20.0"
    kept, last = load_student(best)[0].state_dict(), load_student(config.out)[0].state_dict()
    assert any(not torch.equal(kept[name], last[name]) for name in kept)

    again = scripted()
    train_student(patient, TrainProgress(note=again.append))  # nothing is measured, nothing is trained
    assert again[0] == f"{config.out} has ended already, by `patience`: nothing to do; without it the run goes on"
    further = scripted(15.0, 40.0)
    train_student(replace(patient, patience=None), TrainProgress(note=further.append))
    lines = [json.loads(line) for line in (config.out / "knn.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["student"]) for line in lines] == list(enumerate((10, 30, 30, 20, 15, 40), 1))
    now = load_student(best)[0].state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in load_student(config.out)[0].state_dict().items())


def test_what_was_measured_after_the_checkpoint_is_measured_again(config, scripted):
    config = replace(config, knn_every=1, checkpoint_every=2)
    scripted(10.0, 30.0, 50.0)

    def die(line, total):
        if line["step"] == 3 * STEPS_PER_EPOCH + 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        train_student(config, TrainProgress(log=die))
    notes = scripted(25.0, 20.0)
    train_student(config, TrainProgress(note=notes.append))
    lines = [json.loads(line) for line in (config.out / "knn.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["student"]) for line in lines] == list(enumerate((10, 30, 25, 20), 1))


def test_ctrl_c_in_a_measurement_waits_for_it(config, scripted, monkeypatch):
    scripted(10.0, 20.0, 30.0, 40.0)
    measure, asked = Scripted.measure, [2]

    def interrupted(yardstick, backbone):
        asked[0] -= 1
        if not asked[0]:
            signal.raise_signal(signal.SIGINT)
        return measure(yardstick, backbone)

    monkeypatch.setattr(Scripted, "measure", interrupted)
    watched = replace(config, epochs=4, knn_every=1)
    with pytest.raises(KeyboardInterrupt):
        train_student(watched)
    assert len(log_of(config.out)) == 2 * STEPS_PER_EPOCH
    train_student(watched)
    lines = [json.loads(line) for line in (config.out / "knn.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["student"]) for line in lines] == list(enumerate((10, 20, 30, 40), 1))


def test_patience_without_measurements_is_refused(config, monkeypatch):
    with pytest.raises(MisuseError, match="`patience` 2 goes by what `knn_every` measures"):
        replace(config, patience=2)
    monkeypatch.setattr(module, "FEWEST_IMAGES", 25)
    with pytest.raises(MisuseError, match="and the 24 images are too few for that"):
        train_student(replace(config, knn_every=1, patience=2))
    notes: list[str] = []
    train_student(replace(config, knn_every=1), TrainProgress(note=notes.append))
    assert "`knn_every` has nothing to measure by: 24 images are too few" in notes


@pytest.mark.parametrize(
    ("steps", "rate", "losses", "remedy"),
    [
        (10, 1e-3, (1.0, 0.1), "10 steps are few. More `epochs`, a smaller `batch_size`"),
        (5000, 1e-6, (1.0, 0.1), "the rate was 1e-06 in a step. A higher `lr`"),
        (5000, 1e-3, (1.0, 0.99), "the loss went from 1 to 0.99. Another `lr`"),
        (5000, 1e-3, (1.0, 0.1), "Look at them with rob views"),
    ],
)
def test_worse_than_random_is_loud_and_names_what_helps(tmp_path, monkeypatch, steps, rate, losses, remedy):
    monkeypatch.setattr(module, "read_log", lambda run: [{"loss": loss} for loss in losses])
    (said,) = verdict(Outcome(True, 300, 23.9, 35.0, 47.0, 72.0), tmp_path, steps, 1000, rate, 1e-4)
    assert said.startswith("the student is NO BETTER THAN ITS RANDOM START (23.9 % against 35.0 %)")
    assert remedy in said
    assert verdict(Outcome(True, 300, 60.0, 35.0, 47.0, 72.0), tmp_path, steps, 1000, rate, 1e-4) == []


def test_a_student_below_pixels_is_told(tmp_path):
    """A ViT-Tiny after 2,678 steps on 1,653 photographs: far above its random start, and not worth having."""
    (said,) = verdict(Outcome(True, 300, 59.3, 16.7, 71.3, 79.7), tmp_path, 2678, 1000, 1e-3, 1e-4)
    assert said.startswith("the student (59.3 %) is BELOW RAW PIXELS (71.3 %)")
    assert "longer `budget`" in said


def test_a_teacher_no_better_than_pixels_is_told(tmp_path):
    (said,) = verdict(Outcome(True, 300, 78.0, 37.9, 78.7, 77.3), tmp_path, 5000, 1000, 1e-3, 1e-4)
    assert "no better than raw pixels" in said
    assert "larger `view_size`" in said


def test_an_outcome_is_kept_with_its_checksum(tmp_path):
    outcome = Outcome(True, 300, 60.0, 35.0, 47.0, None)
    write_outcome(tmp_path, outcome)
    assert read_record(tmp_path / "outcome.json", dict, "") == outcome.to_json()
