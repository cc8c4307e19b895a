"""The prefetcher: row i's target is image i's, view k's, for any order, and nothing outlives its epoch."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rob.common.errors import FailureError, MisuseError
from rob.common.order import block_shuffled_order
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest
from rob.common.store.prefetch import TargetPrefetcher, window_blocks
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter

IMAGES, VIEWS, DIM, CHUNK = 203, 4, 8, 8
MIB_A_CHUNK = CHUNK * VIEWS * DIM * 4 / 2**20


def expected(image_ids: np.ndarray, views: np.ndarray) -> torch.Tensor:
    """The target (B, G, DIM) of each image and view: its own numbers, so that no two are alike."""
    image_ids, views = np.broadcast_arrays(np.asarray(image_ids)[:, None], views)
    return torch.as_tensor(image_ids * 100 + views).float()[..., None] + torch.arange(DIM) / DIM


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TargetStore:
    return TargetStore.open(write(tmp_path_factory.mktemp("targets") / "t.zarr"))


def write(path: Path) -> Path:
    manifest = StoreManifest(
        data_fingerprint="", num_images=IMAGES, recipe={}, seed=0, view_ids=tuple(range(VIEWS)), view_size=8, teacher="",
        weights_hash="", head="", dim=DIM, num_prototypes=0, teacher_temp=None, precision="", geometry="", versions={},
        encoding=Encoding("embedding", "float32").to_dict(), chunk_rows=CHUNK, shard_chunks=4,
    )  # fmt: skip
    writer = StoreWriter.open_or_resume(path, manifest)
    for start in range(0, IMAGES, CHUNK):
        ids = np.arange(start, min(start + CHUNK, IMAGES))
        writer.append({"embedding": expected(ids, np.arange(VIEWS)).numpy()})
    writer.finish()
    return path


@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(0, 1000),
    st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    st.booleans(),
    st.integers(0, 2),
)
def test_each_row_is_its_images(store, batch_size, blocks, epoch, rank, cache, start):
    order = block_shuffled_order(IMAGES, CHUNK, blocks, 5, epoch, *rank)[start * 17 :]
    window = MIB_A_CHUNK * (2 * blocks + 3 + -(-batch_size // CHUNK) + 1)
    with TargetPrefetcher(store, batch_size, window_mib=window, cache_in_memory=cache) as prefetcher:
        for _ in range(2):
            batches = list(prefetcher.epoch(order))
            np.testing.assert_array_equal(np.concatenate([batch.image_ids for batch in batches]), order)
            assert {len(batch.image_ids) for batch in batches[:-1]} <= {batch_size}
            for batch in batches:
                assert torch.equal(batch.targets["embedding"], expected(batch.image_ids, np.arange(VIEWS)))


def test_columns_choose_views(store):
    columns = np.array([3, 1])
    with TargetPrefetcher(store, 32, columns=columns) as prefetcher:
        for batch in prefetcher.epoch(np.random.default_rng(0).permutation(IMAGES)):
            assert torch.equal(batch.targets["embedding"], expected(batch.image_ids, columns))


def test_memory_is_the_window(store):
    with TargetPrefetcher(store, 16, window_mib=9 * MIB_A_CHUNK) as prefetcher:
        order = block_shuffled_order(IMAGES, CHUNK, window_blocks(store, 9 * MIB_A_CHUNK), seed=0, epoch=0)
        assert sum(len(batch.image_ids) for batch in prefetcher.epoch(order)) == IMAGES
        assert sum(values.nbytes for values in prefetcher.buffer.values()) == 9 * MIB_A_CHUNK * 2**20
        with pytest.raises(MisuseError, match=r"`window_mib` holds 9 chunks .* needs 26 at once: give `window_mib` 1,"):
            prefetcher.epoch(np.random.default_rng(0).permutation(IMAGES))


@pytest.mark.parametrize("batch_size", [8, 64, 100])
def test_the_window_that_is_asked_for_suffices(store, monkeypatch, batch_size):
    """Chunks count as 1 MiB each here, since they are smaller than the option's unit."""
    monkeypatch.setattr(TargetStore, "chunk_bytes", property(lambda self: 2**20))

    def epoch(window_mib: float) -> int:
        order = block_shuffled_order(IMAGES, CHUNK, window_blocks(store, window_mib), seed=0, epoch=0)
        with TargetPrefetcher(store, batch_size, window_mib=window_mib) as prefetcher:
            return sum(len(batch.image_ids) for batch in prefetcher.epoch(order))

    with pytest.raises(MisuseError, match=r"\(1\.0 MiB each\)") as caught:
        epoch(1)
    asked = re.search(r"give `window_mib` (\d+)", str(caught.value))
    assert epoch(float(asked[1])) == IMAGES


def test_cached_chunks_are_read_once_and_others_every_epoch(store, monkeypatch):
    read: list[int] = []
    read_chunk = TargetStore.read_chunk
    monkeypatch.setattr(
        TargetStore, "read_chunk", lambda self, chunk, out: (read.append(chunk), read_chunk(self, chunk, out))
    )
    for cache, times in [(False, 3), (True, 1)]:
        read.clear()
        with TargetPrefetcher(store, 16, cache_in_memory=cache) as prefetcher:
            for epoch in range(3):
                list(prefetcher.epoch(block_shuffled_order(IMAGES, CHUNK, 4, seed=0, epoch=epoch)))
        assert np.bincount(read).tolist() == [times] * store.manifest.num_chunks


@pytest.mark.parametrize("cache", [False, True])
def test_leaving_early_ends_the_threads_and_the_next_epoch_is_whole(store, cache):
    threads = threading.active_count()
    prefetcher = TargetPrefetcher(store, 8, window_mib=12 * MIB_A_CHUNK, cache_in_memory=cache)
    order = block_shuffled_order(IMAGES, CHUNK, 4, seed=0, epoch=0)
    for _ in range(4):
        for batch in prefetcher.epoch(order):
            if batch.image_ids[0] in order[40:]:
                break
        del batch
    batches = prefetcher.epoch(order)
    next(batches)
    prefetcher.close()
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="closed in the middle"):
        list(batches)
    assert sum(len(batch.image_ids) for batch in prefetcher.epoch(order)) == IMAGES
    assert threading.active_count() == threads


def test_a_damaged_chunk_reaches_the_consumer(tmp_path):
    path = write(tmp_path / "t.zarr")
    shard = path / "embedding" / "c" / "2" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    threads = threading.active_count()
    with TargetPrefetcher(TargetStore.open(path), 8) as prefetcher:
        seen = 0
        with pytest.raises(FailureError, match="chunk 8 of array 'embedding'"):
            for _ in prefetcher.epoch(np.arange(IMAGES)):
                seen += 1
        assert seen <= 8
    assert threading.active_count() == threads


def test_a_store_larger_than_memory_is_not_cached(store, monkeypatch):
    monkeypatch.setattr("rob.common.store.prefetch.usable_memory", lambda: 10_000)
    with pytest.raises(MisuseError, match="leave out `cache_in_memory`"):
        TargetPrefetcher(store, 8, cache_in_memory=True)


def test_no_thread_beside_the_training_step_decodes(store, monkeypatch):
    """Its OpenMP threads would slow every operation of the step down where the student is on the CPU."""
    decode, threads = TargetStore.decode, set()
    monkeypatch.setattr(
        TargetStore, "decode", lambda *given: (threads.add(threading.current_thread()), decode(*given))[1]
    )
    with TargetPrefetcher(store, 16) as prefetcher:
        list(prefetcher.epoch(np.arange(IMAGES)))
    assert threads == {threading.current_thread()}


def test_targets_arrive_on_a_device_that_is_no_gpu_of_nvidia(store):
    with TargetPrefetcher(store, 16, device="meta") as prefetcher:
        assert next(prefetcher.epoch(np.arange(16))).targets["embedding"].is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and pytest -m gpu")
def test_targets_arrive_on_the_device(store):
    with TargetPrefetcher(store, 16, device="cuda") as prefetcher:
        for batch in prefetcher.epoch(np.random.default_rng(0).permutation(IMAGES)):
            assert batch.targets["embedding"].is_cuda
            assert torch.equal(batch.targets["embedding"].cpu(), expected(batch.image_ids, np.arange(VIEWS)))
