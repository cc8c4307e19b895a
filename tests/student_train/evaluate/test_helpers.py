"""rob eval under torchrun: the ranks share what is to be extracted, and rank 0 keeps and tests what one process does."""

import os
import sys
from pathlib import Path

import pytest
import torch

from rob import cli
from rob.student_train.checkpoint import export_weights
from rob.student_train.evaluate import features, network
from rob.student_train.students import StudentConfig, build_student, describe_student
from support.cli import FAST
from support.ranks import on_ranks
from support.tiny import contents, tiny_beton

SHARD_ROWS = 8
"""Of 26 images in batches of 4: pieces of two batches, and at the end half a batch, of which nothing is left for rank 1."""


def evaluate(rank: int, folder: str) -> None:
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(torch.distributed.get_world_size()))
    made = []
    rows = network.extract_features
    network.extract_features = lambda *given: made.append(given[2:4]) or rows(*given)
    evaluated("new")
    Path(f"rank{rank}").write_text(str(made))


def evaluated(out: str) -> None:
    features.SHARD_ROWS = SHARD_ROWS
    sys.argv = ["rob", "eval", "knn", "run", "images-0.beton", "--k", "3", *FAST, "--batch-size", "4", "--out", out]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_features_that_ranks_extract(tmp_path, monkeypatch):
    config = StudentConfig("test_resnet", 32)
    torch.manual_seed(0)
    export_weights(build_student(config), describe_student(config), tmp_path / "run" / "student.safetensors")
    tiny_beton(tmp_path, 26)
    on_ranks(evaluate, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "SHARD_ROWS", SHARD_ROWS)
    evaluated("one")
    assert contents(tmp_path / "new") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "new")) == 5
    assert (tmp_path / "rank0").read_text() == "[(0, 4), (8, 12), (16, 20), (24, 26)]"
    assert (tmp_path / "rank1").read_text() == "[(4, 8), (12, 16), (20, 24), (24, 26)]"
