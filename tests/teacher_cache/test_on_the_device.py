"""What stage 1 leaves to the teacher's device. There is no GPU here: where the work is handed to is watched."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.writer import StoreWriter
from rob.common.views.recipes import get_recipe
from rob.teacher_cache import cache, fitted, write
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.fitted import statistics_of
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support import tiny

HERE = torch.device("cpu", 0)
"""Not what a device is by default, which is no more than ``cpu``."""


def test_statistics_of_a_chunk():
    embedding, logits = torch.randn(4, 2, 3), torch.randn(4, 2, 5)
    found = statistics_of(embedding, logits)
    np.testing.assert_allclose(found["embedding_sum"], embedding.double().sum((0, 1)).numpy(), atol=1e-8)
    assert found["usage"].tolist() == [int((logits.argmax(2) == k).sum()) for k in range(5)]
    assert statistics_of(embedding, None).keys() == {"embedding_sum"}


def test_a_chunk_is_encoded_where_the_teacher_left_it(data: Beton, with_head: TeacherConfig, tmp_path, monkeypatch):
    """The very tensors of the teacher reach the encoder: no copy of all logits was made on the way."""
    left, reached, threads = [], [], []
    chunks, encode = write.chunks, write.encode

    def watched_chunks(*arguments):
        for chunk in chunks(*arguments):
            left.append(chunk.logits.data_ptr())
            yield chunk

    def watched_encode(encoding, embedding, logits=None):
        reached.append(logits.data_ptr())
        return encode(encoding, embedding, logits)

    monkeypatch.setattr(write, "chunks", watched_chunks)
    monkeypatch.setattr(write, "encode", watched_encode)
    monkeypatch.setattr(write, "use_device", lambda device: threads.append(device))
    monkeypatch.setattr(cache, "pick_device", lambda name: HERE)
    cache_teacher(CacheConfig(data.path, tmp_path / "store.zarr", with_head, get_recipe("weak"), 2, device="cpu"))
    assert left == reached
    assert threads == [HERE]


@pytest.mark.parametrize("encoding", ["embedding", "dense"])
def test_prototypes_are_fitted_on_the_teacher_s_device(data, headless, tmp_path, monkeypatch, encoding):
    devices = []
    fit = fitted.fit_prototypes
    monkeypatch.setattr(cache, "pick_device", lambda name: HERE)
    monkeypatch.setattr(fitted, "fit_prototypes", lambda *given: devices.append(given[3]) or fit(*given))
    tiny.tiny_store(tmp_path / "store.zarr", data, headless, prototypes=6, encoding=Encoding(encoding))
    assert devices == [HERE]


def test_a_teacher_that_is_given_is_not_loaded(data, headless, tmp_path, monkeypatch):
    teacher = load_teacher(headless)
    monkeypatch.setattr(cache, "load_teacher", lambda config: pytest.fail("it was given"))
    config = CacheConfig(data.path, tmp_path / "store.zarr", headless, get_recipe("weak"), 2, device="cpu")
    assert cache_teacher(config, None, teacher).weights_hash == teacher.weights_hash


def test_a_chunk_comes_home_on_a_stream_of_its_own(monkeypatch):
    """Which waits for the chunk, and not for what the teacher is given meanwhile."""
    said = []

    class Stream:
        def wait_event(self, event):
            said.append(("waits for", event))

    class Home:
        def record_stream(self, stream):
            said.append(("kept for", type(stream)))

    @contextmanager
    def on(stream):
        said.append("on it")
        yield
        said.append("off it")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    with write.after("made", Home(), None):  # type: ignore[arg-type]
        said.append("read")
    assert said == [("waits for", "made"), "on it", "read", "off it", ("kept for", Stream)]
    with write.after(None, torch.zeros(1)):
        pass


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("whole", [True, False])
def test_a_store_goes_on_with_the_views_that_it_began_with(
    data: Beton, with_head: TeacherConfig, tmp_path, monkeypatch, whole
):
    """Whatever `auto` stands for by now."""
    config = CacheConfig(data.path, tmp_path / "store.zarr", with_head, get_recipe("weak"), 2, device="cpu")
    with monkeypatch.context() as stopped, nullcontext() if whole else pytest.raises(KeyboardInterrupt):
        if not whole:
            stopped.setattr(StoreWriter, "finish", interrupt)
        cache_teacher(config)
    asked = []
    monkeypatch.setattr(cache, "resolve_loader", lambda loader, device, as_in: asked.append(as_in) or loader)
    cache_teacher(config)
    assert asked == ["planes"]
