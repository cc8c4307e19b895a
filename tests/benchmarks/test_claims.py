"""The claims: equal work in every row, all rows run, and a run that is done is not done again."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rob.benchmarks import claims, processes
from rob.benchmarks.claims import prepare, run
from rob.benchmarks.claims_config import ClaimsConfig, Job
from rob.benchmarks.claims_rows import GROUPS, ROWS, USES_STORE, Row, chosen
from rob.benchmarks.claims_run import IMAGE_SIZE, LOCAL_SIZE, one_run, training
from rob.benchmarks.claims_table import mcnemar, over_seeds
from rob.common.errors import MisuseError
from rob.common.store.reader import TargetStore
from rob.teacher_cache.teachers import TeacherConfig
from support.tiny import tiny_beton, tiny_teacher_checkpoint

DIFFERENT = (
    *("embedding", "swav-sslight", "moco-dino", "supervised", "supervised-distilled", "views-live", "views-8"),
    *("topk-16", "dino-same-mlp", "swav-same-frozen", "msn-own", "disco"),
)
"""Rows that differ in more than a value from each other."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ClaimsConfig:
    folder = tmp_path_factory.mktemp("claims")
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
    config = ClaimsConfig(train, test, folder / "out", teacher, teacher_size=32, finetune_epochs=1, **few)
    prepare(config, [ROWS[name] for name in DIFFERENT])
    return config


@pytest.mark.parametrize("student", ["cnn", "vit"])
def test_the_student_has_the_same_work_in_every_row(config, student):
    for row in ROWS.values():
        if row.objective is None:
            continue
        found = training(config, Job(student, row, 0))
        pairing = found.pairing
        pixels = pairing.num_global * IMAGE_SIZE**2 + pairing.num_local * LOCAL_SIZE**2
        assert pixels * found.epochs == (2 * IMAGE_SIZE**2 + config.num_local * LOCAL_SIZE**2) * config.epochs, row.name
        assert found.loader.batch_size == config.batch_size


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_every_kind_of_row_runs(config, name):
    job = Job("cnn", ROWS[name], 0)
    one_run(config, job)
    result = json.loads(job.result(config.out).read_text())
    measures = {"knn_top1", "linear_top1", "train_seconds"}
    assert result.keys() >= measures | ({"average_knn_top1"} if ROWS[name].objective else set())
    row = over_seeds([result, {**result, "row": ROWS[name].against}], "cnn", ROWS[name])
    assert row is not None
    assert row["p"] == (1.0 if ROWS[name].against else None), "against itself"


def test_stores_are_as_the_rows_say_and_compared_with_what_there_is(config):
    stored = [row for row in ROWS.values() if row.kind in USES_STORE and row.objective]
    for row in (row for row in stored if row.name in DIFFERENT):
        manifest = TargetStore.open(config.store_of(row)).manifest
        assert len(manifest.view_ids) == (row.views or config.views)
        assert manifest.encoding["kind"] == row.encoding.kind
        assert manifest.recipe["name"] == (row.recipe or config.recipe)
    of_views, numbers_of_views, encodings = 2, 4, 4
    assert len({config.store_of(row) for row in stored}) == 1 + of_views + numbers_of_views + encodings
    assert {row.against for row in ROWS.values()} <= ROWS.keys() | {""}
    assert [row.name for row in chosen(("embedding", "claims"))][:2] == ["embedding", "random"]
    assert sum(map(len, GROUPS.values())) == len(ROWS)


@pytest.mark.parametrize(("pair", "p"), [((0, 0), 1.0), ((10, 10), 1.0), ((1, 9), 22 / 1024), ((6, 0), 2 / 64)])
def test_mcnemars_exact_test(pair, p):
    assert mcnemar(*pair) == mcnemar(*reversed(pair)) == pytest.approx(p)


def of_images(row: str, seed: int, right: str) -> dict:
    """A run's result by a 1 for every test image that k-NN gets right."""
    hits = np.array([digit == "1" for digit in right])
    measured = {"knn_top1": 100 * hits.mean(), "knn_hits": np.packbits(hits).tobytes().hex()}
    return {"student": "cnn", "row": row, "seed": seed, **measured}


def test_rows_are_compared_seed_by_seed():
    """On the same images. The p is the largest of the seeds', and a seed that only one of the rows has does not count."""
    runs = [
        of_images("ours", 0, "1111111011110000"),
        of_images("theirs", 0, "0000000111110000"),
        of_images("theirs", 1, "0011110000000000"),
        of_images("ours", 1, "1111110000000000"),
        of_images("ours", 2, "1111111111111111"),
        of_images("theirs", 3, "1111111111111111"),
    ]
    rows = [Row("ours", "Ours", None, against="theirs"), Row("theirs", "Theirs", None, against="ours")]
    ours, theirs = (over_seeds(runs, "cnn", row) for row in rows)
    assert (ours["seeds"], ours["points"], ours["points_deviation"]) == (3, 25.0, pytest.approx(12.5 * 2**0.5))
    assert theirs["points"] == -25.0
    assert ours["p"] == theirs["p"] == max(mcnemar(7, 1), mcnemar(2, 0)) == 0.5


@pytest.mark.slow
def test_runs_are_processes_which_are_not_done_again(config, capfd):
    once = replace(config, rows=("random",), students=("cnn",), out=config.out.with_name("again"))
    report = run(once)
    assert [row["setting"] for row in report.rows] == ["random weights", "test_efficientnet_gn"]
    result = once.out / "cnn" / "random" / "0" / "result.json"
    written = result.stat().st_mtime_ns
    run(once)
    assert result.stat().st_mtime_ns == written
    late = run(replace(once, seeds=(0, 1), time_limit=0.0))
    assert late.rows[0]["seeds"] == 1  # no further run was begun
    assert len((once.out / "runs.jsonl").read_text().splitlines()) == 1


def test_what_it_lacks_is_said(config, tmp_path):
    with pytest.raises(MisuseError, match="give --teacher"):
        run(replace(config, out=tmp_path / "a", teacher=None))
    with pytest.raises(MisuseError, match="unknown row 'dino-sane'"):
        run(replace(config, rows=("dino-sane",)))


def test_a_teacher_is_named_or_is_a_file(tmp_path):
    assert claims.teacher_of("efficientnet_lite0") == TeacherConfig("efficientnet_lite0")
    assert claims.teacher_of("resnet18=w.pth") == TeacherConfig("resnet18", Path("w.pth"))


@pytest.mark.parametrize(("exitcode", "method"), [(0, "forkserver"), (1, "spawn")])
def test_runs_are_forked_unless_the_fork_could_not_use_cuda(monkeypatch, exitcode, method):
    class Probe:
        def __init__(self, target):
            assert target is processes._refuse_bad_fork

        def start(self):
            pass

        def join(self):
            self.exitcode = exitcode

    def get_context(name):
        return SimpleNamespace(name=name, set_forkserver_preload=lambda modules: None, Process=Probe)

    monkeypatch.setattr(processes.multiprocessing, "get_context", get_context)
    assert processes.starting().name == method
