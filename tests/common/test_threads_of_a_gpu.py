"""Threads begin on GPU 0: each of ours goes to its run's GPU first. There is none here, so what is asked of CUDA is watched."""

import threading

import numpy as np
import pytest
import torch

from rob.common import run
from rob.common.store import prefetch
from rob.common.store.prefetch import TargetPrefetcher
from rob.common.views import loader
from rob.common.views.config import LoaderConfig
from rob.common.views.loader import ViewLoader
from rob.common.views.recipes import get_recipe
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint


def test_a_thread_is_put_on_the_run_s_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in (None, torch.device("cpu"), torch.device("cuda", 3)):
        run.use_device(device)
    assert chosen == [torch.device("cuda", 3)]


def test_threads_of_targets_do_so(tmp_path, monkeypatch):
    used, here = [], torch.device("cpu", 0)  # by default it is no more than ``cpu``
    store = tiny_store(tmp_path / "targets.zarr", tiny_beton(tmp_path, 8), tiny_teacher_checkpoint(tmp_path))
    monkeypatch.setattr(prefetch, "use_device", used.append)
    with TargetPrefetcher(store, batch_size=4, threads=2, device=here) as prefetcher:
        list(prefetcher.epoch(np.arange(8)))
    assert used == [here] * 3  # two readers and what gathers


def test_threads_of_views_do_so(tmp_path, monkeypatch):
    ffcv_backend = pytest.importorskip("rob.common.views.ffcv_backend", reason="ffcv is not installed")
    used = []
    monkeypatch.setattr(ffcv_backend, "use_device", lambda device: used.append((threading.get_ident(), device)))
    monkeypatch.setattr(ffcv_backend, "current_device", lambda: torch.device("cuda", 3))
    views = ViewLoader(tiny_beton(tmp_path, 8), get_recipe("weak"), 0, LoaderConfig("ffcv", 4, 1))
    list(views.epoch(np.arange(8), [loader.ViewSet((0,), 32)]))
    assert {device for _, device in used} == {torch.device("cuda", 3)}
    assert threading.get_ident() not in {thread for thread, _ in used}
