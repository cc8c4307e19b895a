"""``cache_teacher`` end to end: what is stored is what the teacher says, whatever happens on the way."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.filesize import decimal
from torch import Tensor

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import view_parameters
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import Recipe
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.prototypes import PrototypeConfig, fit_prototypes
from rob.teacher_cache.teachers import load_teacher
from support import tiny

pytestmark = pytest.mark.usefixtures("small_chunks")
IMAGES, VIEWS, SIZE = 40, 2, 32


# ==== what is stored ====


def by_hand(config: CacheConfig) -> Tensor:
    """The teacher's embeddings (N, V, D), an image and a view at a time, with Pillow."""
    data, teacher = Beton(config.data), load_teacher(config.teacher)
    embeddings = []
    for image_id in range(data.num_images):
        for view_id in range(config.views):
            image = Image.fromarray(data.image(image_id))
            one = lambda value: np.array([value])  # noqa: E731
            geometry, colour = view_parameters(
                config.recipe, config.seed, one(image_id), one(view_id), one(image.height), one(image.width)
            )
            top, left, height, width, flip = geometry[0].tolist()
            view = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None]
            pixels = pixels.flip(-1) if flip else pixels
            mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
            embeddings.append(teacher(apply_colours(pixels, torch.from_numpy(colour), SIZE / 224, mean, std)))
    return torch.cat(embeddings).unflatten(0, (-1, config.views))


PILLOW = LoaderConfig("torch", batch_size=3, workers=1)


def test_embeddings_are_what_the_teacher_says_to_each_view(data, headless, tmp_path) -> None:
    config = tiny.tiny_cache_config(
        tmp_path / "a.zarr", data, headless, encoding=Encoding("embedding", "float32"), seed=5, loader=PILLOW
    )
    manifest = cache_teacher(config)
    store, expected = TargetStore.open(config.out), by_hand(config)
    assert manifest == store.manifest
    stored = store.read(0, IMAGES)["embedding"]
    assert stored.shape == (IMAGES, VIEWS, 256)
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    np.testing.assert_allclose(store.statistics["embedding_sum"], stored.sum((0, 1), dtype=np.float64), atol=1e-9)
    assert (manifest.view_ids, manifest.view_size, manifest.seed, manifest.geometry) == ((0, 1), SIZE, 5, "pillow")
    assert manifest.data_fingerprint == data.manifest.fingerprint
    assert manifest.weights_hash == load_teacher(headless).weights_hash
    assert Recipe.from_dict(manifest.recipe) == config.recipe


def test_logits_are_the_embeddings_against_the_published_prototypes(data, with_head, tmp_path) -> None:
    config = tiny.tiny_cache_config(tmp_path / "dense.zarr", data, with_head, encoding=Encoding("dense"), loader=PILLOW)
    cache_teacher(config)
    dense = TargetStore.open(config.out)
    prototypes = load_teacher(with_head).prototypes
    expected = by_hand(config) @ prototypes.T
    np.testing.assert_array_equal(dense.prototypes, prototypes)
    np.testing.assert_allclose(dense.read(0, IMAGES)["logits"], expected, atol=1e-3)
    assert dense.statistics["usage"].sum() == IMAGES * VIEWS
    assert dense.manifest.num_prototypes == 30

    sparse = tiny.tiny_store(tmp_path / "a.zarr", data, with_head, encoding=Encoding("topk", k=5), loader=PILLOW)
    stored = decode(sparse.encoding, sparse.read(0, IMAGES))
    torch.testing.assert_close(stored["logits"], expected.topk(5).values, atol=1e-3, rtol=0)
    torch.testing.assert_close(expected.gather(2, stored["ids"]), stored["logits"], atol=1e-3, rtol=0)
    for place, temp in enumerate(sparse.encoding.temps):
        rest = expected.scatter(2, stored["ids"], -torch.inf)
        torch.testing.assert_close(stored["tail"][..., place], (rest / temp).logsumexp(2), atol=1e-3, rtol=0)


def test_a_teacher_without_a_head_gets_prototypes(data, headless, tmp_path) -> None:
    plain = tiny.tiny_store(tmp_path / "plain.zarr", data, headless)
    fitted = tiny.tiny_store(tmp_path / "fitted.zarr", data, headless, prototypes=6)
    assert (plain.prototypes, fitted.manifest.head, fitted.manifest.num_prototypes) == (None, "fitted", 6)
    embedding = fitted.read(0, IMAGES)["embedding"]
    np.testing.assert_array_equal(embedding, plain.read(0, IMAGES)["embedding"])
    expected = fit_prototypes(lambda start, stop: embedding[start:stop], IMAGES, PrototypeConfig(6, seed=0))
    np.testing.assert_array_equal(fitted.prototypes, expected.prototypes)


@pytest.mark.parametrize("encoding", [Encoding("topk", k=3), Encoding("dense")], ids=["topk", "dense"])
def test_logits_over_fitted_prototypes(data, headless, tmp_path, encoding) -> None:
    embedding = tiny.tiny_store(tmp_path / "embedding.zarr", data, headless, prototypes=6)
    store = tiny.tiny_store(tmp_path / "logits.zarr", data, headless, prototypes=6, encoding=encoding)
    np.testing.assert_array_equal(store.prototypes, embedding.prototypes)
    expected = (
        decode(embedding.encoding, embedding.read(0, IMAGES))["embedding"] @ torch.from_numpy(embedding.prototypes).T
    )
    stored = decode(store.encoding, store.read(0, IMAGES))
    expected_kept = expected.gather(2, stored["ids"]) if encoding.kind == "topk" else expected
    torch.testing.assert_close(stored["logits"], expected_kept, atol=1e-3, rtol=0)
    usage = torch.bincount(expected.argmax(2).flatten(), minlength=6)
    np.testing.assert_array_equal(store.statistics["usage"], usage)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embedding.zarr", "logits.zarr"]  # nothing left between


def test_the_batch_size_changes_nothing_but_rounding(data, headless, tmp_path) -> None:
    float32 = Encoding("embedding", "float32")
    stores = [
        tiny.tiny_store(
            tmp_path / f"{size}.zarr", data, headless, encoding=float32, loader=LoaderConfig(batch_size=size, workers=1)
        )
        for size in (1, 5, 64)
    ]
    first, *rest = [store.read(0, IMAGES)["embedding"] for store in stores]
    for other in rest:
        np.testing.assert_allclose(first, other, atol=1e-5)


@pytest.mark.parametrize(("asked", "taken"), [(4, 4), (7, 4), (64, 8)])
def test_another_batch_size_than_asked_for_is_told(data, headless, tmp_path, asked, taken) -> None:
    notes = []
    loader = LoaderConfig(batch_size=asked, workers=1)
    cache_teacher(
        tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless, loader=loader), CacheProgress(note=notes.append)
    )
    told = [f"batches of {taken} images, not {asked}: a batch size must divide the 8 images of a chunk"]
    assert notes == ([] if taken == asked else told)


# ==== what happens on the way ====


def test_a_second_run_does_nothing(data, headless, with_head, tmp_path) -> None:
    cases = [
        (headless, {}),
        (headless, {"prototypes": 6}),
        (headless, {"prototypes": 6, "encoding": Encoding("topk", k=3)}),
        (with_head, {"encoding": Encoding("dense")}),
    ]
    for number, (teacher, changes) in enumerate(cases):
        config = tiny.tiny_cache_config(tmp_path / f"{number}.zarr", data, teacher, **changes)
        cache_teacher(config)
        before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
        plans = []
        assert cache_teacher(config, CacheProgress(plan=plans.append)) == TargetStore.open(config.out).manifest
        assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before
        assert not plans


def test_one_process_fits_prototypes_to_a_store_at_a_time(data, headless, tmp_path) -> None:
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless)
    cache_teacher(config)
    with tiny.locked_by_another_process(config.out / ".lock"):
        with pytest.raises(MisuseError, match="another rob cache-teacher fits prototypes to it; wait for it to finish"):
            cache_teacher(replace(config, prototypes=6))
        assert TargetStore.open(config.out).prototypes is None
    cache_teacher(replace(config, prototypes=6))
    assert TargetStore.open(config.out).manifest.num_prototypes == 6
    assert not (config.out / ".lock").exists()


def test_plan_and_progress(data, with_head, tmp_path) -> None:
    plans, rows, seen = [], [], []
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, with_head)
    cache_teacher(config, CacheProgress(plan=plans.append, rows=lambda *at: rows.append(at), seen=seen.append))
    (plan,) = plans
    assert (plan.num_images, plan.views, plan.bytes_per_view, plan.rows_done) == (IMAGES, VIEWS, 48, 0)
    assert plan.total_bytes == IMAGES * VIEWS * 48
    assert plan.seconds * plan.views_per_second == pytest.approx(IMAGES * VIEWS)
    assert plan.batch_size == 8
    of_20 = replace(plan, rows_to_do=20)
    assert of_20.seconds * plan.views_per_second == pytest.approx(24 * VIEWS), "the last batch is filled up"
    assert plan.advice() == []
    (of_views,) = replace(plan, views=16, rows_to_do=800, views_per_second=100.0).advice()
    assert of_views.endswith("`views` 4 takes 96 s less")
    large = replace(plan, num_images=10**9 // (VIEWS * 48) + 1)
    (of_bytes,) = large.advice()
    assert of_bytes.startswith("`store_dtype` int8 taught students as well")
    assert of_bytes.endswith(f"it takes {decimal(large.num_images * VIEWS * (48 - 26))} less")
    assert replace(large, rows_done=8).advice() == []
    assert rows == [(done, IMAGES) for done in range(0, IMAGES + 1, 8)]
    assert sum(seen) == IMAGES


def test_a_disk_that_fills_up_is_one_sentence_and_nothing_is_lost(more_data, headless, tmp_path, monkeypatch) -> None:
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", more_data, headless, loader=PILLOW)
    whole = tiny.tiny_store(tmp_path / "b.zarr", more_data, headless, loader=PILLOW)
    replace, renamed = os.replace, []

    def full(source, target) -> None:
        renamed.append(target)
        if len(renamed) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(FailureError, match=r"the disk of .*a\.zarr is full"):
            cache_teacher(config)
    plans = []
    cache_teacher(config, CacheProgress(plan=plans.append))
    assert plans[0].rows_done > 0
    assert tiny.contents(config.out) == tiny.contents(whole.path)
