"""The run folder: a log without gaps or repeats, no checkpoint of a bad step, refusals before anything is written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rob.common.errors import FailureError, MisuseError
from rob.common.ranks import Ranks
from rob.common.records import sealed
from rob.common.timing import Stopwatch
from rob.student_train.run_folder import RunFolder, refuse_what_is_no_run
from support import tiny

CPU = torch.device("cpu")
CONFIG = {"data": Path("a.beton"), "out": Path("run"), "lr": 0.1, "seed": 0, "log_every": 3}
LOADER = {"backend": "torch", "batch_size": 4, "workers": 1}
FACTS = {"data_fingerprint": "abc", "branch": {"teacher": "t", "views": 2}, "versions": {"torch": "2"}}


def open_run(out: Path, config: dict | None = None, facts: dict | None = None, loader: dict | None = None) -> RunFolder:
    settings = {**CONFIG, **(config or {}), "loader": {**LOADER, **(loader or {})}}
    return RunFolder(out, settings, {**FACTS, **(facts or {})}, total_steps=10, on_log=lambda line, total: None)


def some_state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": nn.Linear(2, 2)}


def advance(run: RunFolder, first: int, last: int, bad: int | None = None) -> None:
    """Steps ``first`` .. ``last`` with the step's number as loss."""
    stopwatch = Stopwatch(CPU)
    for step in range(first, last + 1):
        loss = float("nan") if step == bad else float(step)
        run.log(step, step // 5, torch.tensor([loss, 2.0 * step]), 0.1, images=4, stopwatch=stopwatch)


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_the_mean_over_its_steps(tmp_path):
    run = open_run(tmp_path)
    assert run.resume(some_state(), CPU) == 0
    advance(run, 1, 10)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9, 10]  # the last step always ends a line
    assert [line["loss"] for line in lines] == [2, 5, 8, 10]
    assert [line["gradient_norm"] for line in lines] == [4, 10, 16, 20]
    text = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" loss")[0] for line in text] == [
        *("epoch 0 step 3/10", "epoch 1 step 6/10", "epoch 1 step 9/10", "epoch 2 step 10/10")
    ]


def test_the_speed_is_that_of_all_ranks(tmp_path):
    """Each of which logs its own images."""
    config = {**CONFIG, "loader": LOADER}
    run = RunFolder(tmp_path, config, FACTS, total_steps=10, on_log=lambda line, total: None, ranks=Ranks(0, 2))
    stopwatch = SimpleNamespace(take=lambda: ({}, 2.0))  # seconds since the last line
    for step in range(1, 7):
        run.log(step, 0, torch.ones(2), 0.1, images=4, stopwatch=stopwatch)  # type: ignore[arg-type]
    assert [line["images_per_second"] for line in logged(tmp_path)] == [3 * 4 * 2 / 2] * 2


def test_one_process_trains_in_a_folder(tmp_path):
    open_run(tmp_path).resume(some_state(), CPU)
    with tiny.locked_by_another_process(tmp_path / ".lock"):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(MisuseError, match="another rob train-student is writing this run"):
            open_run(tmp_path).resume(some_state(), CPU)
        assert sorted(tmp_path.iterdir()) == before
    open_run(tmp_path).resume(some_state(), CPU)


@pytest.mark.parametrize("stopped_at", [3, 4, 5])
def test_a_line_is_whole_although_the_run_stopped_in_its_middle(tmp_path, stopped_at):
    first = open_run(tmp_path)
    first.resume(some_state(), CPU)
    advance(first, 1, stopped_at)
    first.save(some_state(), stopped_at)
    second = open_run(tmp_path)
    assert second.resume(some_state(), CPU) == stopped_at
    advance(second, stopped_at + 1, 10)
    assert [(line["step"], line["loss"]) for line in logged(tmp_path)] == [(3, 2), (6, 5), (9, 8), (10, 10)]


def test_a_checkpoint_does_not_shorten_the_line_around_it(tmp_path):
    run = open_run(tmp_path)
    run.resume(some_state(), CPU)
    advance(run, 1, 5)
    run.save(some_state(), 5)
    advance(run, 6, 6)
    assert logged(tmp_path)[-1]["loss"] == 5  # of steps 4, 5 and 6


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path):
    killed = open_run(tmp_path)
    killed.resume(some_state(), CPU)
    advance(killed, 1, 4)
    killed.save(some_state(), 4)
    advance(killed, 5, 9)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "los')  # killed while writing
    again = open_run(tmp_path)
    assert again.resume(some_state(), CPU) == 4
    assert [line["step"] for line in logged(tmp_path)] == [3]
    assert (tmp_path / "train.log").read_text().count("\n") == 1
    advance(again, 5, 10)
    assert [line["step"] for line in logged(tmp_path)] == [3, 6, 9, 10]
    assert (tmp_path / "train.log").read_text().count("\n") == 4


def test_without_a_checkpoint_the_log_starts_afresh(tmp_path):
    killed = open_run(tmp_path)
    killed.resume(some_state(), CPU)
    advance(killed, 1, 9)
    assert open_run(tmp_path).resume(some_state(), CPU) == 0
    assert logged(tmp_path) == []
    assert (tmp_path / "train.log").read_text() == ""


@pytest.mark.parametrize("bad", [1, 2, 4, 5])
def test_a_bad_loss_is_named_by_its_step_when_a_line_is_due(tmp_path, bad):
    run = open_run(tmp_path)
    run.resume(some_state(), CPU)
    with pytest.raises(FailureError, match=rf"^step {bad}: the loss is nan with gradient norm {2 * bad}; there is no"):
        advance(run, 1, 6, bad)


def test_a_bad_loss_is_never_checkpointed(tmp_path):
    run = open_run(tmp_path)
    run.resume(some_state(), CPU)
    advance(run, 1, 4)
    run.save(some_state(), 4)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    advance(run, 5, 5, bad=5)
    with pytest.raises(FailureError, match=r"^step 5: .*the last good checkpoint is kept in .*checkpoint\.pt"):
        run.save(some_state(), 5)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_a_gradient_that_is_no_number_is_as_bad(tmp_path):
    run = open_run(tmp_path)
    run.resume(some_state(), CPU)
    run.log(1, 0, torch.tensor([1.0, torch.inf]), 0.1, 4, Stopwatch(CPU))
    with pytest.raises(FailureError, match="step 1: the loss is 1 with gradient norm inf"):
        run.save(some_state(), 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": {"lr": 0.2}}, "lr = 0.1, this run has lr = 0.2"),
        ({"config": {"seed": 1}}, "seed = 0, this run has seed = 1"),
        ({"loader": {"batch_size": 8}}, "batch_size = 4, this run has batch_size = 8"),
        ({"facts": {"data_fingerprint": "xyz"}}, "data_fingerprint = abc, this run has data_fingerprint = xyz"),
        ({"facts": {"branch": {"teacher": "u", "views": 2}}}, r"branch\.teacher = t, this run has branch\.teacher = u"),
    ],
)
def test_other_settings_are_refused_by_name_and_change_nothing(tmp_path, changes, field):
    run = open_run(tmp_path)
    run.resume(some_state(), CPU)
    advance(run, 1, 4)
    run.save(some_state(), 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MisuseError, match=field):
        open_run(tmp_path, **changes).resume(some_state(), CPU)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"log_every": 5}},
        {"config": {"data": Path("moved/a.beton"), "out": Path("moved")}},
        {"loader": {"workers": 8, "backend": "auto"}},
        {"facts": {"versions": {"torch": "3"}}},
    ],
)
def test_what_moves_no_weight_may_change(tmp_path, changes):
    run = open_run(tmp_path)
    state = some_state()
    run.resume(state, CPU)
    run.save(state, 4)
    other = {"model": nn.Linear(2, 2)}
    assert open_run(tmp_path, **changes).resume(other, CPU) == 4
    assert torch.equal(other["model"].weight, state["model"].weight)


def test_config_json_says_what_was_run(tmp_path):
    open_run(tmp_path).resume(some_state(), CPU)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["lr"] == 0.1
    assert config["data"] == "a.beton"
    assert config["branch"] == {"teacher": "t", "views": 2}
    assert config["versions"] == {"torch": "2"}


def test_the_whole_runs_medians_survive_a_resume(tmp_path):
    run = open_run(tmp_path)
    run.resume(some_state(), CPU)
    advance(run, 1, 10)
    speeds = sorted(line["images_per_second"] for line in logged(tmp_path))
    run.save(some_state(), 10)
    again = open_run(tmp_path)
    again.resume(some_state(), CPU)
    loss, speed, shares = again.medians()
    assert (loss, shares["data"], shares["student"]) == (10, 0, 1)
    assert speed == pytest.approx((speeds[1] + speeds[2]) / 2)


def test_what_another_run_or_program_left_is_not_written_over(tmp_path):
    refuse_what_is_no_run(tmp_path)
    (tmp_path / "config.json").write_bytes(sealed({"student": {}}))
    refuse_what_is_no_run(tmp_path)  # of a run that was killed before its first checkpoint
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(
        MisuseError, match=r"has student\.safetensors and no checkpoint\.pt to go on from: give another"
    ):
        refuse_what_is_no_run(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    refuse_what_is_no_run(tmp_path)
    for content in (b'{"name": "my-site"}', sealed({"facts": {}})):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(MisuseError, match=r"config\.json is of something else: give the run a folder of its own"):
            refuse_what_is_no_run(tmp_path)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(MisuseError, match=r"`out` .*run is a file"):
        refuse_what_is_no_run(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "notes"
