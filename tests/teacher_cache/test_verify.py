"""``verify``: stores that are as the teacher says pass at a tight tolerance, and every way of being wrong is told apart."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from rob.common.views.loader import LoaderConfig, geometry
from rob.teacher_cache.teachers import TeacherConfig
from rob.teacher_cache.verify import Comparison, VerifyConfig, VerifyProgress, VerifyResult, verify
from support import tiny

SAME_MACHINE = 1e-4
EVERY_VIEW = 24 * 2

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    return tiny.tiny_beton(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(tmp_path_factory.mktemp("headless"))


@pytest.fixture(scope="module")
def with_head(tmp_path_factory) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(tmp_path_factory.mktemp("with_head"), prototypes=40)


@pytest.fixture(scope="module")
def store(data: Beton, headless: TeacherConfig, tmp_path_factory) -> TargetStore:
    """Embeddings in half precision. Not to be changed."""
    return tiny.tiny_store(tmp_path_factory.mktemp("store") / "targets.zarr", data, headless)


def check(store: TargetStore, data: Beton, teacher: TeacherConfig, **changes) -> VerifyResult:
    settings = {"samples": EVERY_VIEW, "device": "cpu", "tolerance": SAME_MACHINE, "workers": 1, "batch_size": 7}
    return verify(VerifyConfig(store.path, data.path, teacher, **(settings | changes)))


def rewritten(store: TargetStore, out: Path, change: Callable[[Arrays], Arrays]) -> TargetStore:
    """A flawless store of the same manifest whose arrays (N, V, ...) are ``change`` of the ones in ``store``."""
    writer = StoreWriter.open_or_resume(out, store.manifest)
    writer.append(change(store.read(0, store.manifest.num_images)))
    writer.finish(store.prototypes, store.statistics)
    return TargetStore.open(out)


def shifted(arrays: Arrays) -> Arrays:
    return {name: np.roll(values, 1, axis=0) for name, values in arrays.items()}


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding("embedding", "float32"),
        Encoding("embedding", "int8"),
        Encoding("topk", k=8),
        Encoding("topk", k=40),
        Encoding("dense"),
    ],
    ids=["float32", "int8", "topk", "topk of all", "dense"],
)
def test_each_encoding_passes_and_a_shift_by_one_row_does_not(data, with_head, tmp_path, encoding) -> None:
    store = tiny.tiny_store(tmp_path / "right.zarr", data, with_head, encoding=encoding)
    result = check(store, data, with_head)
    assert result.chunks == 1
    assert len(result.samples) == EVERY_VIEW
    assert result.worst.error == max(sample.error for sample in result.samples) <= 1
    assert result.worst.cosine > 0.9999
    assert result.mean_cosine > 0.9999
    with pytest.raises(
        FailureError, match=r"4[0-9] of 48 views are not what the teacher says; the worst is view [01] of image \d+ \("
    ):
        check(rewritten(store, tmp_path / "shifted.zarr", shifted), data, with_head, tolerance=None)


@pytest.mark.parametrize("name", ["ids", "logits", "tail"])
def test_each_part_of_a_sparse_target_is_checked(data, with_head, tmp_path, name) -> None:
    store = tiny.tiny_store(tmp_path / "right.zarr", data, with_head, encoding=Encoding("topk", k=8))
    wrong = rewritten(store, tmp_path / "wrong.zarr", lambda arrays: arrays | {name: shifted(arrays)[name]})
    with pytest.raises(FailureError, match=r"4[0-9] of 48"):
        check(wrong, data, with_head)


def test_single_precision_is_the_same_to_its_last_digits(data, headless, tmp_path) -> None:
    store = tiny.tiny_store(tmp_path / "a.zarr", data, headless, encoding=Encoding("embedding", "float32"))
    result = check(store, data, headless, tolerance=1e-5, precision="auto")  # on a CPU: fp32
    assert max(sample.difference for sample in result.samples) < 1e-5


@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_logits_over_fitted_prototypes_pass(data, headless, tmp_path, kind) -> None:
    store = tiny.tiny_store(tmp_path / "a.zarr", data, headless, encoding=Encoding(kind, k=4), prototypes=8)
    assert check(store, data, headless).worst.cosine > 0.9999


def test_the_pillow_path_is_verified_with_pillow(data, headless, tmp_path) -> None:
    loader = LoaderConfig("torch", batch_size=16, workers=1)
    pillow = tiny.tiny_store(tmp_path / "a.zarr", data, headless, loader=loader)
    check(pillow, data, headless)
    if geometry(LoaderConfig()) != "pillow":  # the two resize alike, not the same: the right one was taken
        as_planes = rewritten(replaced(pillow, geometry="planes"), tmp_path / "b.zarr", dict)
        with pytest.raises(FailureError, match="views are not what the teacher says"):
            check(as_planes, data, headless)


def replaced(store: TargetStore, **changes) -> TargetStore:
    """The same arrays under another manifest, in memory."""
    other = TargetStore(store.path, replace(store.manifest, **changes))
    return other


def test_a_store_in_half_precision_arithmetic_passes(data, headless, tmp_path) -> None:
    store = tiny.tiny_store(tmp_path / "a.zarr", data, headless, precision="bf16")
    assert check(store, data, headless, tolerance=None).worst.error <= 1


def test_one_wrong_view_is_named_among_all(store, data, headless, tmp_path) -> None:
    def change(arrays: Arrays) -> Arrays:
        arrays["embedding"][17, 1] = arrays["embedding"][17, 0]
        return arrays

    path = re.escape(data.manifest.paths[17])
    with pytest.raises(FailureError, match=rf"1 of 48 views .* view 1 of image 17 \({path}\): cosine 0\.\d+"):
        check(rewritten(store, tmp_path / "a.zarr", change), data, headless)


def test_what_is_zero_on_both_sides_agrees() -> None:
    ones = torch.nn.functional.normalize(torch.ones(3, 4), dim=1)
    live, stored = ones * torch.tensor([[0.0], [0], [1]]), ones * torch.tensor([[0.0], [1], [1]])
    compare = Comparison(Encoding("embedding", "float32"), None, SAME_MACHINE)
    (zero, zero_error), (one, one_error), (same, _) = [(c, e) for c, _, e in compare({"embedding": stored}, live)]
    assert (zero, zero_error) == (1, 0)
    assert one == 0 < 1 < one_error
    assert same == pytest.approx(1)


def test_no_cosine_is_below_the_lowest(store, data, headless) -> None:
    result = check(store, data, headless)
    assert result.lowest_cosine == min(sample.cosine for sample in result.samples) <= result.mean_cosine


def test_a_small_error_is_within_the_default_tolerance_only(store, data, headless, tmp_path) -> None:
    def change(arrays: Arrays) -> Arrays:
        noise = (
            np.random.default_rng(0).normal(size=arrays["embedding"].shape) * 0.01 / 16
        )  # distance 0.01 in 256 dimensions
        return {"embedding": (arrays["embedding"] + noise).astype(np.float16)}

    noisy = rewritten(store, tmp_path / "a.zarr", change)
    assert 0.1 < check(noisy, data, headless, tolerance=None).worst.error < 1
    with pytest.raises(FailureError, match="48 of 48"):
        check(noisy, data, headless)


def test_wrong_data(store, headless, tmp_path) -> None:
    other = tiny.tiny_beton(tmp_path, seed=1)
    with pytest.raises(MisuseError, match="another data set"):
        check(store, other, headless)


def test_changed_pixels_under_the_right_fingerprint(data, headless, tmp_path) -> None:
    raw = tiny.tiny_beton(tmp_path, raw=True)
    store = tiny.tiny_store(tmp_path / "a.zarr", raw, headless)
    start, size = int(raw.pointers[5]), int(raw.sizes[5])
    with open(raw.path, "r+b") as file:
        file.seek(start)
        file.write(255 - raw.memory[start : start + size])
    with pytest.raises(FailureError, match=r"images-0\.beton: image 5 is damaged"):
        check(store, Beton(raw.path), headless)


def test_wrong_teacher(store, data, with_head, tmp_path) -> None:
    with pytest.raises(
        MisuseError, match=r"was cached from teacher \w+ with weights [0-9a-f]{12}, this is \w+ with weights"
    ):
        check(store, data, tiny.tiny_teacher_checkpoint(tmp_path, seed=1))
    with pytest.raises(MisuseError, match="was cached from teacher"):
        check(store, data, with_head)


def test_a_flipped_bit_in_a_chunk(data, headless, tmp_path) -> None:
    store = tiny.tiny_store(tmp_path / "a.zarr", data, headless)
    flip(next((store.path / "embedding" / "c").rglob("0/0/0")), 200)
    with pytest.raises(FailureError, match=r"chunk 0 of array 'embedding' .* is damaged"):
        check(store, data, headless)


@pytest.mark.parametrize("name", ["prototypes", "statistics/embedding_sum"])
def test_a_small_array_with_a_flipped_bit_or_without_its_file(data, with_head, tmp_path, name) -> None:
    """A missing file is zeros to zarr."""
    store = tiny.tiny_store(tmp_path / "a.zarr", data, with_head)
    flip(next(file for file in (store.path / name / "c").rglob("*") if file.is_file()), 30)
    with pytest.raises(FailureError, match=f"'{name}' is damaged"):
        check(store, data, with_head)
    shutil.rmtree(store.path / name / "c")
    with pytest.raises(FailureError, match=f"'{name}' is damaged \\(its file is missing\\)"):
        check(store, data, with_head)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_samples_are_drawn_by_the_seed_without_repetition(store, data, headless) -> None:
    def drawn(seed: int, samples: int = 20) -> set[tuple[int, int]]:
        result = check(store, data, headless, samples=samples, seed=seed)
        return {(sample.image_id, sample.view_id) for sample in result.samples}

    assert len(drawn(0)) == 20
    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, samples=1000) == {(image, view) for image in range(24) for view in range(2)}


def test_progress_ends_at_its_totals(store, data, headless) -> None:
    chunks, samples = [], []
    progress = VerifyProgress(lambda *at: chunks.append(at), lambda *at: samples.append(at))
    verify(VerifyConfig(store.path, data.path, headless, samples=10, device="cpu", batch_size=4, workers=1), progress)
    assert chunks == [(1, 1)]
    assert samples[-1] == (10, 10)
    assert samples == sorted(samples)


@pytest.mark.parametrize("option", [{"samples": 0}, {"tolerance": 0.0}, {"tolerance": 2.0}])
def test_options_out_of_range(store, data, headless, option) -> None:
    with pytest.raises(MisuseError, match=f"`{next(iter(option))}` is"):
        check(store, data, headless, **option)
