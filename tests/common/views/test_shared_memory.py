"""Worker processes in a container with little shared memory: the same batches, another way."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from rob.common import shared_memory
from rob.common.errors import FailureError
from rob.common.views import pillow_backend
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import RECIPES

SETS = [ViewSet((0, 1), 24)]


def batches(data, order=None):
    loader = ViewLoader(data, RECIPES["weak"], 0, LoaderConfig("torch", batch_size=6, workers=2))
    return list(loader.epoch(np.arange(24) if order is None else order, SETS))


def test_little_shared_memory_gives_the_same_batches_through_pipes(small_beton, monkeypatch):
    plain, sent = batches(small_beton), []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 1000, 0))
    unpacked = pillow_backend._unpacked
    monkeypatch.setattr(pillow_backend, "_unpacked", lambda packed: sent.append(packed) or unpacked(packed))
    piped = batches(small_beton)
    assert len(sent) == 4
    assert all(isinstance(array, np.ndarray) for packed in sent for array in packed[1])
    for one, other in zip(plain, piped, strict=True):
        assert np.array_equal(one.image_ids, other.image_ids)
        assert all(map(torch.equal, one.views, other.views))
        assert all(map(torch.equal, one.colour, other.colour))


def test_where_there_is_no_telling_it_suffices(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "PLACE", tmp_path / "nowhere")
    assert shared_memory.shared_memory_holds(1 << 60)


def test_a_killed_worker_is_one_sentence(small_beton, monkeypatch):
    def dying(*_):
        import os

        os.kill(os.getpid(), 9)

    monkeypatch.setattr(pillow_backend, "resize_view", dying)
    with pytest.raises(FailureError, match=r"a process that loads images was killed.*take fewer `workers`"):
        batches(small_beton)
