"""The loader: the same view however it is asked for, and what goes wrong; ``test_backends`` compares the back ends."""

import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.views import loader as loader_module
from rob.common.views.drawing import LOCAL, view_parameters
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet, check_loader, geometry, resolve_loader
from support.loaders import DINO, SETS, assert_same, needs_ffcv, views_by_image


@pytest.fixture(scope="module")
def expected(backend, small_beton) -> dict[int, list[torch.Tensor]]:
    """In file order, one worker, in batches of 5."""
    return views_by_image(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 5, 1)), np.arange(24))


# --- the same view, however it is asked for ---


def test_batches_come_in_order_and_in_shape(backend, small_beton):
    order = np.random.default_rng(0).permutation(24)
    batches = list(
        (batch.image_ids.copy(), [v.shape for v in batch.views], [c.shape for c in batch.colour], batch.views[0].dtype)
        for batch in ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 10, 2)).epoch(order, SETS)
    )
    np.testing.assert_array_equal(np.concatenate([ids for ids, *_ in batches]), order)
    for (ids, views, colours, dtype), n in zip(batches, (10, 10, 4), strict=True):
        assert len(ids) == n
        assert views == [(n, 2, 3, 32, 32), (n, 3, 3, 16, 16)]
        assert colours == [(n, 2, 8), (n, 3, 8)]
        assert dtype == torch.uint8


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 24), (2, 7), (2, 1)])
def test_a_view_has_the_same_pixels_for_any_workers_order_and_batch_size(
    backend, expected, small_beton, workers, batch_size
):
    loader = ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, batch_size, workers))
    for epoch in range(2):
        assert_same(views_by_image(loader, np.random.default_rng(epoch).permutation(24)), expected)


def test_a_view_has_the_same_pixels_whatever_views_come_with_it(backend, expected, small_beton):
    """One stage caches two global views, the other asks for those, other views and another size beside them."""
    loader = ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 8, 2))
    alone = views_by_image(loader, np.arange(24), [ViewSet((1,), 32)])
    other = views_by_image(loader, np.arange(24), [ViewSet((5, LOCAL + 7, 1, 0), 32), ViewSet((0, 1), 31)])
    for image_id in range(24):
        pixels, colour = expected[image_id][0], expected[image_id][2]
        assert torch.equal(alone[image_id][0][0], pixels[1])
        assert torch.equal(other[image_id][0][2], pixels[1])
        assert torch.equal(other[image_id][0][3], pixels[0])
        assert torch.equal(alone[image_id][1][0], colour[1])


def test_another_seed_gives_other_views(backend, expected, small_beton):
    other = views_by_image(ViewLoader(small_beton, DINO, 4, LoaderConfig(backend, 24, 1)), np.arange(24))
    assert not any(torch.equal(other[i][0], expected[i][0]) for i in range(24))


def test_colour_is_that_of_view_parameters(expected, small_beton):
    for i in (0, 23):
        size = np.array(small_beton.heights[i]), np.array(small_beton.widths[i])
        for s, colour in zip(SETS, expected[i][2:], strict=True):
            np.testing.assert_array_equal(view_parameters(DINO, 3, np.array(i), np.array(s.ids), *size).colour, colour)


# --- what goes wrong ---


def damaged(source: Beton, tmp_path, image_id: int) -> Beton:
    """A copy in which an image has lost its first bytes."""
    content = bytearray(source.path.read_bytes())
    first = int(source.pointers[image_id])
    content[first : first + 100] = bytes(100)
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)
    (tmp_path / "damaged.beton.json").write_bytes(source.path.with_name(source.path.name + ".json").read_bytes())
    return Beton(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_image_is_named_and_nothing_hangs(backend, small_beton, expected, tmp_path, workers):
    loader = ViewLoader(damaged(small_beton, tmp_path, 13), DINO, 3, LoaderConfig(backend, 4, workers))
    with pytest.raises(FailureError, match=r"damaged.beton: image 13 .*pack the data again") as raised:
        views_by_image(loader, np.arange(24))
    assert "Traceback" not in str(raised.value)
    others = views_by_image(loader, np.delete(np.arange(24), 13))
    assert_same(others, {i: tensors for i, tensors in expected.items() if i != 13})


def test_an_epoch_may_be_left_early(backend, small_beton, expected):
    loader = ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 2, 2))
    first = next(iter(loader.epoch(np.arange(24), SETS)))
    assert first.image_ids.tolist() == [0, 1]
    abandoned = loader.epoch(np.arange(24), SETS)  # still referred to when the next epoch begins
    next(abandoned)
    small = [ViewSet((0,), 8)]
    assert len(views_by_image(loader, np.arange(24), small)) == 24
    assert_same(views_by_image(loader, np.arange(24)), expected)


@needs_ffcv
def test_an_epoch_that_a_newer_one_ended_says_so(small_beton):
    loader = ViewLoader(small_beton, DINO, 3, LoaderConfig("ffcv", 2, 1))
    older = loader.epoch(np.arange(24), SETS)
    next(older)
    next(loader.epoch(np.arange(24), SETS))
    with pytest.raises(RuntimeError, match="newer epoch"):
        list(older)


@needs_ffcv
def test_finished_epochs_leave_no_thread_but_the_pools(small_beton):
    loader = ViewLoader(small_beton, DINO, 3, LoaderConfig("ffcv", 8, 2))
    views_by_image(loader, np.arange(24))
    before = threading.active_count()
    for _ in range(3):
        next(iter(loader.epoch(np.arange(24), SETS)))
    assert threading.active_count() == before


def test_torchs_thread_count_is_left_alone(backend, small_beton):
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            views_by_image(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 8, 1)), np.arange(24))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


def test_an_empty_order_gives_no_batch(backend, small_beton):
    assert not list(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend)).epoch(np.arange(0), SETS))


def test_batches_wait_for_the_copy_out_of_their_memory(small_beton):
    """A CUDA event stands for the copy: the memory may be written again only when it has passed."""
    ffcv_backend = pytest.importorskip("rob.common.views.ffcv_backend")

    class Copy:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

    fetcher = ffcv_backend.ViewFetcher(small_beton, DINO, 3, 4, 1)
    fetcher.set_views(SETS)
    first = fetcher(np.arange(4))
    assert first.slot is not None
    first.slot.copied = copy = Copy()
    pixels = first.views[0].clone()
    for _ in range(ffcv_backend.BATCHES_AHEAD + 1):
        fetcher(np.arange(4, 8))
        assert torch.equal(first.views[0], pixels)
    assert not copy.waited
    fetcher(np.arange(4, 8))
    assert copy.waited
    assert not torch.equal(first.views[0], pixels)


def test_batches_go_to_a_device(small_beton, backend):
    batch = next(iter(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 4, 1)).epoch(np.arange(4), SETS)))
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(moved.views, batch.views, strict=True))
    there = batch.to(torch.device("meta"))
    assert there.views[0].device.type == "meta"
    assert there.to(torch.device("meta")) is there  # a live teacher asks for it again


# --- options ---


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(MisuseError, match=f"`{next(iter(options))}`"):
        LoaderConfig(**options)


def test_an_unknown_backend_is_refused():
    with pytest.raises(MisuseError, match=r"unknown loader 'dali'.*known: auto, ffcv, gpu, torch"):
        LoaderConfig("dali")


def test_workers_are_the_cores_unless_given():
    assert LoaderConfig(workers=3).threads == 3
    assert LoaderConfig().threads >= 1


def test_without_ffcv_the_plain_backend_serves(monkeypatch, small_beton):
    expected = views_by_image(ViewLoader(small_beton, DINO, 3, LoaderConfig("torch", 24, 1)), np.arange(24))
    monkeypatch.setattr(loader_module, "ffcv_backend", None)
    config = LoaderConfig("auto", 24, 1)
    assert geometry(config) == "pillow"
    assert_same(views_by_image(ViewLoader(small_beton, DINO, 3, config), np.arange(24)), expected)
    with pytest.raises(MisuseError, match="ffcv"):
        check_loader(replace(config, backend="ffcv"))


ASKED = """
import torch
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, lambda *_, name=name: print(name, flush=True))
import rob, rob.cli, rob.student_train.train, rob.teacher_cache.cache, rob.student_train.evaluate.linear, rob.benchmarks.claims
assert torch.cuda.is_available() is None  # and it is as before
"""


def test_no_import_asks_for_cuda():
    """A process that was asked for it leaves every child that is forked off it without."""
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "is_available\n"), done.stdout + done.stderr


IMPORTED = """
import numba.typed, torch
torch.set_num_threads(2)
usual = numba.typed.Dict
import numpy as np
from rob.common.images.beton import Beton
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import get_recipe
loader = ViewLoader(Beton({path!r}), get_recipe("weak"), 0, LoaderConfig("ffcv", 4, 1))
assert len(list(loader.epoch(np.arange(8), [ViewSet((0,), 32)]))) == 2
from ffcv.fields.rgb_image import IMAGE_MODES
from numba.np.ufunc import parallel
print(torch.get_num_threads(), numba.typed.Dict is usual, type(IMAGE_MODES).__name__, parallel._is_initialized)
"""


def test_using_ffcv_changes_nothing_and_leaves_nothing_behind(small_beton):
    """It sets torch to one thread: everything would then train on one core. It has numba compile a typed dictionary, which
    takes three seconds of each command's start. And it starts numba's threads, whose end a process on one core never saw."""
    pytest.importorskip("ffcv")
    code = IMPORTED.replace("{path!r}", repr(str(small_beton.path)))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["2", "True", "dict", "False"]


def test_numbas_types_are_left_as_they_are(small_beton):
    """ffcv's reader marks numba's only uint8[::1] read-only. As that changes the type's hash, compiled functions are
    not found again, and the next compilation in the process dies."""
    numba = pytest.importorskip("numba")
    count = numba.njit(lambda a: a.size)
    bytes_type = numba.types.uint8[::1]
    count.compile((bytes_type,))
    next(iter(ViewLoader(small_beton, DINO, 3, LoaderConfig("ffcv", 4, 1)).epoch(np.arange(4), SETS)))
    assert bytes_type.mutable
    assert [sig.args for sig in count.nopython_signatures] == [(bytes_type,)]


# ==== what auto stands for ====


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there, with ffcv and Triton; returns what is known of it, to be changed."""
    known = {"loader": None}
    monkeypatch.setattr(loader_module, "stored_settings", lambda device: SimpleNamespace(**known))
    monkeypatch.setattr(loader_module, "find_spec", lambda name: name)
    if loader_module.ffcv_backend is None:
        names = SimpleNamespace(GEOMETRY="planes", GEOMETRY_ON_GPU="planes-gpu")
        monkeypatch.setattr(loader_module, "ffcv_backend", names)
    return known


def test_auto_on_a_gpu_is_the_gpus_views_unless_the_check_found_otherwise(gpu):
    cuda, auto = torch.device("cuda", 0), LoaderConfig(batch_size=7)
    assert resolve_loader(auto, cuda) == LoaderConfig("gpu", batch_size=7)
    for found, backend in (("gpu", "gpu"), ("ffcv", "ffcv"), ("auto", "ffcv")):
        gpu["loader"] = found
        assert resolve_loader(auto, cuda).backend == backend
    assert resolve_loader(auto, torch.device("cpu")).backend == "ffcv"


def test_what_is_asked_for_by_name_is_taken(gpu):
    for backend in ("ffcv", "torch", "gpu"):
        assert resolve_loader(LoaderConfig(backend), torch.device("cuda", 0), "planes-gpu").backend == backend


def test_exact_pairs_take_the_loader_of_their_targets(gpu):
    cuda = torch.device("cuda", 0)
    gpu["loader"] = "gpu"
    assert geometry(resolve_loader(LoaderConfig(), cuda, "planes")) == "planes"
    gpu["loader"] = "ffcv"
    assert geometry(resolve_loader(LoaderConfig(), cuda, "planes-gpu")) == "planes-gpu"
    assert resolve_loader(LoaderConfig(), torch.device("cpu"), "planes-gpu").backend == "ffcv"
    assert geometry(resolve_loader(LoaderConfig(), cuda, "pillow")) == "pillow"  # made where ffcv is not installed


def test_without_triton_the_cpu_makes_them(gpu, monkeypatch):
    monkeypatch.setattr(loader_module, "find_spec", lambda name: None)
    assert resolve_loader(LoaderConfig(), torch.device("cuda", 0)).backend == "ffcv"


@needs_ffcv
def test_a_threads_decompressor_goes_with_it(monkeypatch):
    """A loader has threads of its own, and a run of many epochs may make a loader for each."""
    from rob.common.views import decode

    gone: list[int] = []
    monkeypatch.setattr(decode, "_lib", SimpleNamespace(tjInitDecompress=lambda: 7, tjDestroy=gone.append))
    thread = threading.Thread(target=decode.decoder_handle)
    thread.start()
    thread.join()
    assert gone == [7]
