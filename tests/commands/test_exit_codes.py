"""One sentence and an exit code for what ends a command: misuse, Ctrl-C, memory, a disk, a loss that is no number."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rob.common.images.beton import BetonWriter
from rob.common.store.writer import StoreWriter
from rob.student_train.train import Trainer


def test_misuse_is_exit_code_2_and_one_sentence_on_stderr(tmp_path):
    command = [sys.executable, "-m", "rob", "pack", str(tmp_path / "nowhere"), str(tmp_path / "out.beton")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {tmp_path / 'nowhere'}: no such file or folder")
    assert child.stderr.count("\n") == 1


def test_ctrl_c_is_exit_code_130(rob, made, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        outcome = rob("train-student", *made.train, "--out", tmp_path / "run")
    assert outcome.code == 130
    assert "stopped at step 0 of 3: run the same command again to go on from there" in outcome.out
    assert rob("train-student", *made.train, "--out", tmp_path / "run").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", interrupted)
        outcome = rob("cache-teacher", made.data, tmp_path / "t.zarr", *made.cache)
    assert outcome.code == 130
    assert "stopped: run the same command again to go on from the last whole chunk" in outcome.out
    assert not outcome.err
    monkeypatch.setattr(BetonWriter, "append", interrupted)
    outcome = rob("pack", made.images, tmp_path / "again.beton")
    assert (outcome.code, outcome.err) == (130, "stopped: run the same command again\n")


def test_what_the_system_refuses_is_one_sentence(refused, made, tmp_path):
    (tmp_path / "notes").write_text("a file")
    refused(1, r"notes", "train-student", *made.train, "--out", tmp_path / "notes" / "run")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]
)
def test_out_of_memory_is_one_sentence(rob, made, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainer, "step", fail)
    train = ("train-student", *made.train, "--out", tmp_path / "run")
    outcome = rob(*train)
    assert (outcome.code, outcome.err) == (
        1,
        "error: out of memory: lower --batch-size, the size of the views, or --prototypes\n",
    )
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        rob(*train)


def test_a_full_disk_while_caching_keeps_what_is_written(rob, made, tmp_path, monkeypatch):
    store, whole = tmp_path / "targets.zarr", made.store
    writes, fsync = [], os.fsync

    def full_after_one(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_one)
        outcome = rob("cache-teacher", made.data, store, *made.cache)
    assert outcome.code == 1
    assert re.match("error: the disk of .* is full: .* what is written is safe: make room and run", outcome.err)
    assert outcome.err.count("\n") == 1
    train = rob("train-student", *made.train_on(store), "--out", tmp_path / "run")
    assert train.code == 2
    assert "is half-written, 0 of 24 rows are done: run rob cache-teacher again to go on" in train.err
    assert not (tmp_path / "run").exists()

    assert rob("cache-teacher", made.data, store, *made.cache).code == 0
    assert contents(store) == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_too_large_for_the_disk_is_refused_beforehand(refused, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(2, r"needs [\d.]+ kB and [\d.]+ kB are free", "cache-teacher", made.data, tmp_path / "t.zarr", *made.cache)


def test_nan_is_exit_code_1_and_keeps_the_checkpoint(rob, made, tmp_path):
    run = ("train-student", *made.train, "--out", tmp_path / "run", "--optimiser", "sgd", "--clip-grad", 0)
    outcome = rob(*run, "--lr", 1e38, "--warmup-epochs", 0)
    assert outcome.code == 1
    assert re.match(r"error: step \d+: the loss is .*; there is no checkpoint yet\. Lower --lr", outcome.err)
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_other_settings_on_resume_are_refused_by_name(rob, refused, made, tmp_path):
    command = ("train-student", *made.train, "--out", tmp_path / "run")
    assert rob(*command).code == 0
    refused(
        2, "made with optimiser.lr = 0.0005, this run has optimiser.lr = 0.001: resume with", *command, "--lr", 0.001
    )
    refused(2, "made with epochs = 1, this run has epochs = 2", *command, "--epochs", 2)  # not the warm-up that follows


def test_a_damaged_line_of_the_log_is_named(rob, refused, made, tmp_path):
    train = ("train-student", *made.train, "--out", tmp_path / "run")
    assert rob(*train).code == 0
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo\n')
    refused(1, r"metrics\.jsonl: line \d is cut or no JSON: delete that line", *train)
    refused(1, r"metrics\.jsonl: line \d is cut or no JSON", "compare", tmp_path / "run", "--out", tmp_path / "a.png")
