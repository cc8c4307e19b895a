import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.views import loader as loader_module
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import LOCAL, UNCHANGED, view_parameters
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet, check_loader, geometry
from rob.common.views.recipes import get_recipe
from support.photographs import photograph

needs_ffcv = pytest.mark.skipif(loader_module.ffcv_backend is None, reason="ffcv is not installed")
BACKENDS = [pytest.param("ffcv", marks=needs_ffcv), "torch"]
DINO = get_recipe("dino")
SETS = (ViewSet((0, 1), 32), ViewSet((LOCAL, LOCAL + 1, LOCAL + 7), 16))


def views_by_image(loader: ViewLoader, order, sets=SETS) -> dict[int, list[torch.Tensor]]:
    """Of each image its views and colours, cloned out of the batches."""
    seen = {}
    for batch in loader.epoch(np.asarray(order), sets):
        for b, image_id in enumerate(batch.image_ids.tolist()):
            assert image_id not in seen
            seen[image_id] = [tensor[b].clone() for tensor in (*batch.views, *batch.colour)]
    return seen


def assert_same(a: dict[int, list[torch.Tensor]], b: dict[int, list[torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    for image_id, tensors in a.items():
        for x, y in zip(tensors, b[image_id], strict=True):
            assert torch.equal(x, y), f"image {image_id}"


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean().clamp(min=1e-9)))


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


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


# --- the two back ends ---


@needs_ffcv
def test_both_backends_give_the_same_views(small_beton):
    fast, plain = (
        views_by_image(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 24, 1)), np.arange(24))
        for backend in ("ffcv", "torch")
    )
    for i in range(24):
        for a, b in zip(fast[i][:2], plain[i][:2], strict=True):
            assert min(map(psnr, a, b)) > 38
        assert torch.equal(fast[i][2], plain[i][2])


@needs_ffcv
def test_both_backends_give_the_same_views_of_photographs_at_every_decode_scale(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the sample photographs")
    folder = tmp_path / "in"
    folder.mkdir()
    for row, pixels in enumerate(datasets.load_sample_images().images):
        Image.fromarray(pixels).save(folder / f"{row}.jpg", quality=90)
        Image.fromarray(pixels[100:250, 200:350]).save(folder / f"{row}-small.jpg", quality=90, subsampling=0)
    pack(PackConfig(str(folder), tmp_path / "data.beton"))
    data = Beton(tmp_path / "data.beton")
    for sets in (
        [ViewSet((0, 1), 224), ViewSet((LOCAL, LOCAL + 1), 96)],
        [ViewSet((0, 1, 2), 40)],
        [ViewSet((0,), 12)],
    ):
        fast, plain = (
            views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 4, 1)), np.arange(4), sets)
            for backend in ("ffcv", "torch")
        )
        for i in range(4):
            for a, b in zip(fast[i][: len(sets)], plain[i][: len(sets)], strict=True):
                assert min(map(psnr, a, b)) > 38
                assert (a.float() - b.float()).abs().mean() < 2


@needs_ffcv
def test_both_backends_give_nearly_the_same_pixels_of_uncompressed_images(image_folder, tmp_path):
    pack(PackConfig(str(image_folder), tmp_path / "raw.beton", raw=True))
    fast, plain = (
        views_by_image(ViewLoader(Beton(tmp_path / "raw.beton"), DINO, 3, LoaderConfig(backend, 24, 1)), np.arange(24))
        for backend in ("ffcv", "torch")
    )
    for i in range(24):
        for a, b in zip(fast[i][:2], plain[i][:2], strict=True):
            assert (a.int() - b.int()).abs().max() <= 2


def test_images_that_were_grey_or_had_odd_sizes(backend, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(photograph(0)[..., 0]).save(folder / "grey.jpg")
    for height, width in ((1, 1), (1, 30), (17, 31)):
        Image.fromarray(photograph(1)[:height, :width]).save(folder / f"{height}x{width}.jpg")
    pack(PackConfig(str(folder), tmp_path / "data.beton"))
    data = Beton(tmp_path / "data.beton")
    seen = views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 3, 2)), np.arange(4))
    grey = seen[data.manifest.paths.index("grey.jpg")][0].int()
    assert (grey - grey[:, :1]).abs().max() <= 3
    assert len(seen) == 4


@needs_ffcv
def test_what_only_pillow_can_decode_is_decoded(tmp_path):
    """Stray bytes behind a marker: common in old photographs, and an error to libjpeg-turbo's simple interface."""
    pixels = photograph(0)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "0.jpg", quality=95)
    stored = (folder / "0.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(stored[:-2] + bytes(40) + stored[-2:])
    pack(PackConfig(str(folder), tmp_path / "data.beton"))
    data = Beton(tmp_path / "data.beton")
    assert data.sizes[1] == data.sizes[0] + 40, "packed as it is"
    sets = [ViewSet((0,), 24)]
    fast, plain = (
        views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 2, 1)), np.arange(2), sets)
        for backend in ("ffcv", "torch")
    )
    assert (fast[1][0].int() - plain[1][0].int()).abs().max() <= 2


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
    assert batch.to(torch.device("meta")).views[0].device.type == "meta"


# --- planes, for a GPU ---


@needs_ffcv
@pytest.mark.parametrize("raw", [False, True])
def test_planes_give_the_views_of_the_cpu_path(image_folder, tmp_path, raw):
    """In plain torch on the CPU; test_kernel_interpreted has the kernel, test_kernel_gpu the GPU."""
    from rob.common.views.ffcv_backend import FfcvBackend

    pack(PackConfig(str(image_folder), tmp_path / "data.beton", raw=raw))
    data, order = Beton(tmp_path / "data.beton"), np.random.default_rng(0).permutation(24)
    expected = views_by_image(ViewLoader(data, DINO, 3, LoaderConfig("ffcv", 24, 1)), order)
    seen, mean, std = 0, torch.zeros(3), torch.ones(3)
    for batch in FfcvBackend(data, DINO, 3, 7, 2, planes=True).epoch(order, SETS):
        neutral = tuple(torch.tensor(UNCHANGED).expand_as(c) for c in batch.colour)
        assert batch.views == ()
        for number, s in enumerate(SETS):
            views = replace(batch, colour=neutral).augment(number, 1.0, mean, std) * 255
            assert views.shape == (len(batch.image_ids), len(s.ids), 3, s.size, s.size)
            for b, image_id in enumerate(batch.image_ids.tolist()):
                for view, pixels in zip(views[b], expected[image_id][number], strict=True):
                    assert psnr(view, pixels) > 44
                    assert (view - pixels).abs().mean() < 1
                assert torch.equal(batch.colour[number][b], expected[image_id][2 + number])
                seen += 1
    assert seen == 24 * len(SETS)


def test_a_batch_is_augmented_as_its_views_are(backend, small_beton):
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    for batch in ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 24, 1)).epoch(np.arange(24), SETS):
        for number, (views, colour) in enumerate(zip(batch.views, batch.colour, strict=True)):
            expected = apply_colours(views.flatten(0, 1), colour.flatten(0, 1), 0.3, mean, std)
            assert torch.equal(batch.augment(number, 0.3, mean, std).flatten(0, 1), expected)
            assert batch.augment(number, 0.3, mean, std, torch.bfloat16).dtype == torch.bfloat16


@needs_ffcv
@pytest.mark.parametrize("kind", ["raw", "left to Pillow"])
def test_images_that_are_not_decoded_at_a_smaller_scale_have_room(tmp_path, kind):
    """They used to be written whole into the room of the smaller ones, and over what lay behind."""
    folder = tmp_path / "in"
    folder.mkdir()
    for row in range(6):
        Image.fromarray(photograph(row, 400, 500)).save(folder / f"{row}.jpg", quality=95)
        if kind == "left to Pillow" and row % 2:
            stored = (folder / f"{row}.jpg").read_bytes()
            (folder / f"{row}.jpg").write_bytes(stored[:-2] + bytes(40) + stored[-2:])
    pack(PackConfig(str(folder), tmp_path / "data.beton", raw=kind == "raw"))
    data, sets = Beton(tmp_path / "data.beton"), [ViewSet((0, 1), 16)]
    fast, plain = (
        views_by_image(ViewLoader(data, DINO, 0, LoaderConfig(backend, 6, 1)), np.arange(6), sets)
        for backend in ("ffcv", "torch")
    )
    for i in range(6):
        assert (fast[i][0].float() - plain[i][0].float()).abs().mean() < 2


def test_views_are_made_on_a_gpu_only_when_asked():
    pytest.importorskip("triton")
    pytest.importorskip("ffcv")
    assert geometry(LoaderConfig()) == geometry(LoaderConfig("ffcv")) == "planes"
    on_gpu = LoaderConfig("gpu")
    assert geometry(on_gpu) == "planes-gpu"
    check_loader(on_gpu, torch.device("cuda"))
    with pytest.raises(MisuseError, match="`backend` gpu makes the views on a CUDA device, and this runs on cpu"):
        check_loader(on_gpu, torch.device("cpu"))
    check_loader(LoaderConfig(), torch.device("cpu"))


def test_planes_become_the_same_views(small_beton):
    """Both stages make views through Batch.augment: from planes (here by the reference of the kernel) as from views."""
    pytest.importorskip("triton")
    pytest.importorskip("ffcv")
    mean, std = torch.zeros(3), torch.ones(3)
    batches = [
        next(iter(ViewLoader(small_beton, DINO, 3, LoaderConfig(backend, 8, 1)).epoch(np.arange(8), SETS)))
        for backend in ("ffcv", "gpu")
    ]
    assert batches[1].planes is not None
    for number in range(len(SETS)):
        resized, made = (batch.to(torch.device("cpu")).augment(number, 0.2, mean, std) for batch in batches)
        assert resized.shape == made.shape
        assert (resized - made).abs().mean() < 2 / 255


# --- options ---


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(MisuseError, match=f"`{next(iter(options))}`"):
        LoaderConfig(**options)


def test_an_unknown_backend_is_refused():
    with pytest.raises(MisuseError, match=r"unknown loader 'dali': .*known: auto, ffcv, gpu, torch"):
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


def test_torch_keeps_its_threads():
    """ffcv sets torch to one thread when it is imported: everything would then train on one core."""
    code = "import torch; torch.set_num_threads(2); import rob.common.views.loader; print(torch.get_num_threads())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "2"


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
