"""The ablation: equal work in every row, all rows run, and a run that is done is not done again."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rob.benchmarks import ablation
from rob.benchmarks.ablation import IMAGE_SIZE, LOCAL_SIZE, AblationConfig, Job, one_run, run, training
from rob.benchmarks.ablation_rows import ROWS
from rob.common.errors import MisuseError
from rob.teacher_cache.teachers import TeacherConfig
from support.tiny import tiny_beton, tiny_teacher_checkpoint

TRAINED = [name for name, row in ROWS.items() if row.objective is not None]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> AblationConfig:
    folder = tmp_path_factory.mktemp("ablation")
    train, test = tiny_beton(folder, 32).path, tiny_beton(folder, 24, seed=1).path
    teacher: TeacherConfig = tiny_teacher_checkpoint(folder, prototypes=16)
    few = {
        "epochs": 1,
        "batch_size": 16,
        "linear_epochs": 1,
        "workers": 1,
        "device": "cpu",
        "seeds": (0,),
        "teacher_temp": 0.1,
    }
    config = AblationConfig(train, test, folder / "out", teacher, teacher_size=32, **few)
    ablation.cached_store(config)
    return config


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("student", ["cnn", "vit"])
def test_the_student_has_the_same_work_in_every_row(config, student, name):
    found = training(config, Job(student, ROWS[name], 0))
    pairing = found.pairing
    pixels = pairing.num_global * IMAGE_SIZE**2 + pairing.num_local * LOCAL_SIZE**2
    assert pixels == 2 * IMAGE_SIZE**2 + config.num_local * LOCAL_SIZE**2
    assert (found.epochs, found.loader.batch_size) == (config.epochs, config.batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs(config, monkeypatch, name):
    monkeypatch.setattr(ablation, "knn", lambda train, test: ablation_knn(train, test))
    job = Job("cnn", ROWS[name], 0)
    one_run(config, job)
    result = json.loads((job.folder(config.out) / "result.json").read_text())
    assert {"knn_top1", "linear_top1", "train_seconds"} <= result.keys()


def ablation_knn(train, test):
    """Twenty neighbours are too many of so few images."""
    from rob.student_train.evaluate.knn import knn

    return knn(train, test, k=5)


@pytest.mark.slow
def test_runs_are_processes_which_are_not_done_again(config, capfd):
    chosen = replace(
        config, rows=("random",), students=("cnn",), out=config.out.with_name("again"), store=config.store_path
    )
    report = run(chosen)
    assert [row["setting"] for row in report.rows] == ["random weights", "test_efficientnet_gn"]
    result = chosen.out / "cnn" / "random" / "0" / "result.json"
    written = result.stat().st_mtime_ns
    run(chosen)
    assert result.stat().st_mtime_ns == written
    late = run(replace(chosen, seeds=(0, 1), time_limit=0.0))
    assert late.rows[0]["seeds"] == 1  # no further run was begun
    assert len((chosen.out / "runs.jsonl").read_text().splitlines()) == 1


def test_what_it_lacks_is_said(config, tmp_path):
    with pytest.raises(MisuseError, match="give --teacher"):
        run(replace(config, out=tmp_path / "a", teacher=None))
    with pytest.raises(MisuseError, match="unknown row 'dino-sane'"):
        run(replace(config, rows=("dino-sane",)))


def test_a_teacher_is_named_or_is_a_file(tmp_path):
    assert ablation.teacher_of("efficientnet_lite0") == TeacherConfig("efficientnet_lite0")
    assert ablation.teacher_of("resnet18=w.pth") == TeacherConfig("resnet18", Path("w.pth"))


@pytest.mark.parametrize(("exitcode", "method"), [(0, "forkserver"), (1, "spawn")])
def test_runs_are_forked_unless_the_fork_could_not_use_cuda(monkeypatch, exitcode, method):
    class Probe:
        def __init__(self, target):
            assert target is ablation._refuse_bad_fork

        def start(self):
            pass

        def join(self):
            self.exitcode = exitcode

    def get_context(name):
        return SimpleNamespace(name=name, set_forkserver_preload=lambda modules: None, Process=Probe)

    monkeypatch.setattr(ablation.multiprocessing, "get_context", get_context)
    assert ablation.starting().name == method
