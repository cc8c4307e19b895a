"""Checkpoint files as people download and save them: what is read of them, and what is said of what cannot be."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rob.common.errors import MisuseError
from rob.common.tensors import read_tensors, under
from rob.teacher_cache.checkpoints import prototype_rows


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.full((2, 2), value), "conv.bias": torch.full((2,), value)}


@pytest.mark.parametrize(
    ("raw", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("state_dict", "ema_state_dict")],
)
def test_the_average_is_taken_where_there_is_one(tmp_path, raw, average):
    torch.save({raw: weights(1.0), average: weights(2.0), "epoch": 3}, tmp_path / "a.pth")
    assert {float(t.mean()) for t in read_tensors(tmp_path / "a.pth").values()} == {2.0}
    torch.save({raw: weights(1.0), average: {"decay": 0.99}}, tmp_path / "a.pth")  # no weights
    assert {float(t.mean()) for t in read_tensors(tmp_path / "a.pth").values()} == {1.0}


@pytest.mark.parametrize("newer", [False, True])
def test_both_forms_of_weight_norm_give_the_same_prototypes(tmp_path, newer):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    if newer:
        layer = nn.utils.parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(3)
    else:
        with pytest.warns(FutureWarning):
            layer = nn.utils.weight_norm(layer)
        with torch.no_grad():
            layer.weight_g.mul_(3)
    torch.save(
        {"teacher": {f"module.head.last_layer.{k}": v for k, v in layer.state_dict().items()}}, tmp_path / "a.pth"
    )
    rows = prototype_rows(under(read_tensors(tmp_path / "a.pth"), "teacher.head.last_layer."), unit=False)
    layer(torch.ones(1, 6))  # the older form computes its weight when it runs
    torch.testing.assert_close(rows, layer.weight.detach())


def test_safetensors_are_read_whatever_they_are_called(tmp_path):
    save_file(weights(1.0), tmp_path / "pytorch_model.bin")
    assert set(read_tensors(tmp_path / "pytorch_model.bin")) == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 346\n",
            "a pointer of Git LFS, not the file",
        ),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an error message of a file server"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_is_no_checkpoint_is_said_to_be_what_it_is(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MisuseError, match=rf"checkpoint .*{name} is {words}"):
        read_tensors(tmp_path / name)


class FsdpState:
    def __reduce__(self):
        return torch.distributed.fsdp.FullyShardedDataParallel, ()


def test_a_part_of_a_sharded_training_says_which_file_to_take(tmp_path):
    torch.save({"model": FsdpState()}, tmp_path / "model_0012499.rank_0.pth")
    with pytest.raises(MisuseError, match=r"is one rank's part of a training run \(FSDP\).*teacher_checkpoint\.pth"):
        read_tensors(tmp_path / "model_0012499.rank_0.pth")


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir], ids=["pipe", "device", "folder"]
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_only_regular_files_are_read(tmp_path: Path, make, name):
    make(tmp_path / name)
    with pytest.raises(MisuseError, match="checkpoint"):
        read_tensors(tmp_path / name)
