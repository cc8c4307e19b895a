"""Other programs are told a run's log: each step once, whatever is killed, and none of them can end the run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rob.common.errors import MisuseError
from rob.common.records import sealed
from rob.student_train.loggers import logger, mlflow_logger, tensorboard_logger, wandb_logger
from rob.student_train.loggers.logger import Loggers
from support.training import log_of

SETTINGS = {"epochs": 2, "student": {"name": "test_resnet"}, "data": Path("x.beton")}


def line(step: int) -> dict:
    return {"step": step, "loss": 1.0 / step, "shares": {"data": 0.5}, "warning": "text"}


def tensorboard_steps(out: Path) -> list[int]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    assert "train/shares/data" in found.Tags()["scalars"]
    return [event.step for event in found.Scalars("train/loss")]


def mlflow_steps(out: Path) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rob").experiment_id])
    assert run.info.run_name == out.name
    assert run.info.status == "FINISHED"
    assert run.data.params["student.name"] == "test_resnet"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def wandb_steps(out: Path) -> list[int]:
    """Of the files that ``wandb sync`` would send: records with a header of 7 bytes, the length in the fifth and sixth."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits for the process that writes them
    steps, ids = [], set()
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        data, at = path.read_bytes(), 7
        while at + 7 < min(len(data), 1 << 15):
            size = int.from_bytes(data[at + 4 : at + 6], "little")
            record = Record.FromString(data[at + 7 : at + 7 + size])
            ids |= {record.run.run_id} - {""}
            steps += [int(i.value_json) for i in record.history.item if [i.key, *i.nested_key][-1] == "_step"]
            at += 7 + size
    assert len(ids) == 1
    return steps


STEPS = {"tensorboard": tensorboard_steps, "mlflow": mlflow_steps, "wandb": wandb_steps}


@pytest.mark.filterwarnings("default")  # the packages' own
@pytest.mark.parametrize("name", STEPS)
def test_a_killed_run_goes_on_in_the_same_place_without_double_steps(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    out, notes = tmp_path / "run", []
    killed = Loggers([name], out, SETTINGS, [line(1)], notes.append)  # begun without a logger: it is told what was
    for step in (2, 3, 4):
        killed.log(line(step))
    if name == "wandb":
        killed.close(finished=False)  # two runs of one process; of a killed process its service ends it
    resumed = Loggers([name], out, SETTINGS, [line(1), line(2)], notes.append)  # from step 2
    for step in (3, 4, 5):
        resumed.log(line(step))
    resumed.log({"step": 5, "student": 50.0}, "knn")
    resumed.close(finished=True)
    assert STEPS[name](out)[:5] == [1, 2, 3, 4, 5]
    assert notes == []


def test_a_logger_that_fails_is_noted_once_and_the_others_go_on(tmp_path, monkeypatch):
    told, notes = [], []

    def fails(step, values):
        raise ConnectionError("the server\nis gone")

    broken = SimpleNamespace(log=fails, close=fails)
    whole = SimpleNamespace(
        log=lambda step, values: told.append((step, values)), close=lambda finished: told.append(finished)
    )
    monkeypatch.setattr(wandb_logger, "open_logger", lambda opening: broken)
    monkeypatch.setattr(mlflow_logger, "open_logger", lambda opening: whole)
    loggers = Loggers(["wandb", "mlflow"], tmp_path, SETTINGS, [], notes.append)
    loggers.log(line(1))
    loggers.log(line(2))
    loggers.close(finished=True)
    assert told == [(s, {"train/loss": 1 / s, "train/shares/data": 0.5}) for s in (1, 2)] + [True]
    assert notes == ["wandb failed and is told no more; metrics.jsonl has everything (ConnectionError: the server)"]


def test_training_tells_its_log(config, monkeypatch):
    from dataclasses import replace

    from rob.student_train.train import train_student

    told = []
    whole = SimpleNamespace(
        log=lambda step, values: told.append((step, values)), close=lambda finished: told.append(finished)
    )
    monkeypatch.setattr(tensorboard_logger, "open_logger", lambda opening: whole)
    monkeypatch.setattr(logger, "check_installed", lambda names: None)
    monkeypatch.setattr("rob.student_train.train.check_installed", lambda names: None)
    train_student(replace(config, epochs=1, loggers=("tensorboard",)))
    log = log_of(config.out)
    assert [(step, values["train/loss"]) for step, values in told[:-1]] == [(x["step"], x["loss"]) for x in log]
    assert told[-1] is True


def test_what_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch):
    def refuses(opening):
        raise ValueError("no API key configured\nsee the docs")

    monkeypatch.setattr(wandb_logger, "open_logger", refuses)
    with pytest.raises(MisuseError, match=r"`loggers` wandb cannot be opened: ValueError: no API key configured$"):
        Loggers(["wandb"], tmp_path, SETTINGS, [], print)
    monkeypatch.setattr(logger, "find_spec", lambda name: None)
    with pytest.raises(MisuseError, match=r"pip install -c constraints\.txt -e '\.\[wandb\]'"):
        logger.check_installed(["wandb"])
    (tmp_path / "loggers.json").write_bytes(sealed({"told": {}}).replace(b"told", b"toll"))
    with pytest.raises(Exception, match=r"loggers\.json is damaged"):
        Loggers(["mlflow"], tmp_path, SETTINGS, [], print)
