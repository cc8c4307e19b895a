"""``cache_teacher`` end to end: what is stored is what the teacher says, whatever happens on the way."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import RAW, Beton, BetonWriter, StoredImage
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest
from rob.common.store.reader import TargetStore
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import view_parameters
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import Recipe
from rob.teacher_cache import cache
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.prototypes import PrototypeConfig, fit_prototypes
from rob.teacher_cache.teachers import TeacherConfig, load_teacher
from support import tiny

IMAGES, VIEWS, SIZE = 40, 2, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(folder: Path) -> Beton:
    return tiny.tiny_beton(folder, IMAGES)


@pytest.fixture(scope="module")
def more_data(folder: Path) -> Beton:
    return tiny.tiny_beton(folder, 200, seed=1)


@pytest.fixture(scope="module")
def headless(folder: Path) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(folder)


@pytest.fixture(scope="module")
def with_head(folder: Path) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(folder, prototypes=30)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five chunks of 8 images, in shards of 2."""
    monkeypatch.setattr(cache, "StoreManifest", partial(StoreManifest, chunk_rows=8, shard_chunks=2))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


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
            view = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
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


def test_what_is_in_the_way_is_refused_before_the_teacher_runs(data, headless, tmp_path, monkeypatch) -> None:
    logits = {"encoding": Encoding("topk", k=3), "prototypes": 6}
    foreign = tiny.tiny_cache_config(tmp_path / "thesis", data, headless, **logits)
    foreign.out.mkdir()
    (foreign.out / "chapter1.tex").write_text("...")
    begun = tiny.tiny_cache_config(tmp_path / "begun.zarr", data, headless, **logits)
    tiny.tiny_store(tmp_path / "whole.zarr", data, headless, **logits)
    (begun.out / "pending").mkdir(parents=True)
    manifest = TargetStore.open(tmp_path / "whole.zarr").manifest.to_json()
    (begun.out / "pending" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(cache, "embedder", lambda *_: pytest.fail("the teacher ran"))
    with pytest.raises(MisuseError, match="thesis is already there and is not a target store: give another path"):
        cache_teacher(foreign)
    with pytest.raises(MisuseError, match="thesis is already there and is not a target store: give another path"):
        cache_teacher(tiny.tiny_cache_config(foreign.out, data, headless))
    with pytest.raises(
        MisuseError, match=r"begun\.zarr was begun with other settings \(encoding\.k is 3 in the store, not 4"
    ):
        cache_teacher(replace(begun, encoding=Encoding("topk", k=4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun.zarr", "thesis", "whole.zarr"]


def test_a_size_that_the_teacher_cannot_take_begins_no_store(data, tmp_path) -> None:
    save_file(timm.create_model("levit_128s", num_classes=0).state_dict(), tmp_path / "levit.safetensors")
    teacher = TeacherConfig("levit_128s", tmp_path / "levit.safetensors")
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, teacher, view_size=96)
    with pytest.raises(MisuseError, match=r"levit_128s can't take views of 96x96 \(.*\); its own size is 224"):
        cache_teacher(config)
    assert not config.out.exists()


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
    plans, rows = [], []
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, with_head)
    cache_teacher(config, CacheProgress(plan=plans.append, rows=lambda *at: rows.append(at)))
    (plan,) = plans
    assert (plan.num_images, plan.views, plan.bytes_per_view, plan.rows_done) == (IMAGES, VIEWS, 48, 0)
    assert plan.total_bytes == IMAGES * VIEWS * 48
    assert plan.seconds > 0
    assert rows == [(done, IMAGES) for done in range(0, IMAGES + 1, 8)]


def test_a_disk_too_small_is_refused_before_anything_is_written(data, headless, tmp_path, monkeypatch) -> None:
    needed = IMAGES * VIEWS * 512
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 1, needed - 1))
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless)
    with pytest.raises(MisuseError, match=r"a\.zarr needs 0\.00 GB and 0\.00 GB are free"):
        cache_teacher(config)
    assert not config.out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 0, needed))
    cache_teacher(config)


def test_plan_and_disk_hold_the_logits_and_the_embeddings_beside_them(data, headless, tmp_path, monkeypatch) -> None:
    logits, embeddings = 2 * 20, 2 * 256
    needed, plans = IMAGES * VIEWS * (logits + embeddings), []
    usage = namedtuple("usage", "total used free")
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless, encoding=Encoding("dense"), prototypes=20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 1, needed - 1))
    with pytest.raises(MisuseError, match=r"a\.zarr, with the embeddings beside it until it is done, needs 0\.00 GB"):
        cache_teacher(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 0, needed))
    cache_teacher(config, CacheProgress(plan=plans.append))
    (plan,) = plans
    assert (plan.bytes_per_view, plan.temporary_bytes_per_view, plan.total_bytes) == (logits, embeddings, needed)


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
    assert contents(config.out) == contents(whole.path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed is 0 in the store, not 1"),
        ({"views": 3}, "view_ids"),
        ({"encoding": Encoding("embedding", "int8")}, "encoding.dtype"),
        ({"view_size": 24}, "view_size"),
        ({"precision": "bf16"}, "precision"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(more_data, headless, tmp_path, changes, named, finished) -> None:
    out = tmp_path / "a.zarr"
    config = tiny.tiny_cache_config(out, more_data, headless, loader=PILLOW)
    if finished:
        cache_teacher(config)
    else:
        stop_after(config, rows=16)
    before = contents(out)
    stands = "complete, with other settings" if finished else "begun with other settings"
    with pytest.raises(MisuseError, match=rf"a\.zarr (is already there and|was) {stands} \(.*{re_escaped(named)}"):
        cache_teacher(tiny.tiny_cache_config(out, more_data, headless, **({"loader": PILLOW} | changes)))
    assert contents(out) == before


def re_escaped(text: str) -> str:
    return text.replace(".", r"\.")


class Stopped(Exception):
    pass


def stop_after(config: CacheConfig, rows: int) -> None:
    """A run that ends as Ctrl-C ends it, once so many rows are done."""

    def stop(done: int, total: int) -> None:
        if done >= rows:
            raise Stopped

    with pytest.raises(Stopped):
        cache_teacher(config, CacheProgress(rows=stop))


def test_other_data_and_another_teacher_are_refused(more_data, headless, tmp_path) -> None:
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", more_data, headless, loader=PILLOW)
    stop_after(config, rows=16)
    other = tiny.tiny_beton(tmp_path, 200, seed=2)
    with pytest.raises(MisuseError, match="data_fingerprint"):
        cache_teacher(tiny.tiny_cache_config(config.out, other, headless, loader=PILLOW))
    with pytest.raises(MisuseError, match="weights_hash"):
        cache_teacher(
            tiny.tiny_cache_config(config.out, more_data, tiny.tiny_teacher_checkpoint(tmp_path, seed=1), loader=PILLOW)
        )


def answering(monkeypatch, value: float, *image_ids: int) -> None:
    """The teacher's embeddings of the images become all ``value``."""

    def embedder(*args):
        embed = real(*args)

        def changed(batch):
            embedding = embed(batch)
            embedding[np.isin(batch.image_ids, image_ids)] = value
            return embedding

        return torch.inference_mode()(changed)

    real = cache.embedder
    monkeypatch.setattr(cache, "embedder", embedder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_no_numbers_are_refused_by_image(data, headless, tmp_path, monkeypatch, value) -> None:
    answering(monkeypatch, value, 17, 22)
    with pytest.raises(FailureError, match=r"for 2 of 8 images is NaN or infinite \(image ids 17, 22\)"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless)


def test_all_zero_embeddings_are_told_of(data, headless, tmp_path, monkeypatch) -> None:
    notes = []
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless)
    answering(monkeypatch, 0, 5, 17, 22)
    cache_teacher(config, CacheProgress(note=notes.append))
    (note,) = [note for note in notes if "all-zero" in note]
    assert note.startswith("6 views have an all-zero embedding")
    assert "--view-size above 32" in note


@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_logits_need_prototypes(data, headless, tmp_path, kind) -> None:
    with pytest.raises(MisuseError, match=f"--encoding {kind} needs prototype logits, .* add --prototypes K"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless, encoding=Encoding(kind))


def test_prototypes_are_not_fitted_beside_published_ones(data, with_head, tmp_path) -> None:
    with pytest.raises(MisuseError, match="has 30 prototypes of its own"):
        tiny.tiny_store(tmp_path / "a.zarr", data, with_head, prototypes=6)


@pytest.mark.parametrize("kind", ["embedding", "dense"])
def test_more_prototypes_than_the_data_bear_are_refused_before_anything_is_cached(
    data, headless, tmp_path, kind
) -> None:
    with pytest.raises(MisuseError, match="--prototypes 21 does not suit 80 embeddings: give from 2 to 20"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless, prototypes=21, encoding=Encoding(kind))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"views": 0}, {"prototypes": -1}])
def test_options_out_of_range(data, headless, tmp_path, option) -> None:
    with pytest.raises(MisuseError, match=f"--{next(iter(option))} is"):
        tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless, **option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(data, headless, tmp_path) -> None:
    with pytest.raises(MisuseError, match="no CUDA device"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless, device="cuda")


# ==== killed ====

CACHE_SLOWLY = """
import sys, time
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[4]))
from support import tiny
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest
from rob.teacher_cache import cache
from rob.teacher_cache.teachers import TeacherConfig
from test_cache import KILLED
cache.StoreManifest = partial(StoreManifest, chunk_rows=8, shard_chunks=2)

def rows(done, total):
    print(done, flush=True)
    time.sleep(0.02)

data, checkpoint, out = map(Path, sys.argv[1:4])
config = tiny.tiny_cache_config(out, Beton(data), TeacherConfig(tiny.TEACHER, checkpoint), **KILLED[sys.argv[5]])
cache.cache_teacher(config, cache.CacheProgress(rows=rows))
"""

KILLED = {
    "embedding": {},
    "fitted": {"encoding": Encoding("topk", k=4), "prototypes": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_killed_at_any_moment_and_run_again_it_is_byte_for_byte_the_same(more_data, headless, tmp_path, case) -> None:
    whole = tiny.tiny_store(tmp_path / "whole.zarr", more_data, headless, **KILLED[case])
    out = tmp_path / "killed.zarr"
    script = [sys.executable, "-c", CACHE_SLOWLY, str(more_data.path), str(headless.checkpoint), str(out)]
    script += [str(torch.get_num_threads()), case]
    kill_at, delay = random.randrange(2, 20 if case == "embedding" else 45), random.uniform(0, 0.05)
    print(f"killed {delay} s after line {kill_at}")
    with subprocess.Popen(script, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as process:
        for _ in range(kill_at):
            assert process.stdout.readline()
        signal.sigtimedwait([], delay)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    cache_teacher(tiny.tiny_cache_config(out, more_data, headless, **KILLED[case]))
    assert contents(out) == contents(whole.path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".killed")]


# ==== memory ====

PEAK_OF_CACHING = """
import sys
from pathlib import Path
import torch
from torch import nn
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.teacher_cache import cache
from rob.teacher_cache.teachers import Teacher, TeacherConfig

torch.set_num_threads(1)
backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 1024))
backbone.num_features = 1024
cache.load_teacher = lambda config: Teacher("wide", backbone)
data, out = map(Path, sys.argv[1:])
cache.cache_teacher(cache.CacheConfig(
    data, out, TeacherConfig("wide"), get_recipe("weak"), views=2, view_size=8, device="cpu",
    encoding=Encoding("embedding", "int8"), loader=LoaderConfig(batch_size=128, workers=1),
))
status = Path("/proc/self/status").read_text()  # ru_maxrss would start from the parent's
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_does_not_grow_with_the_data(tmp_path) -> None:
    peaks = []
    for num_images in (1_000, 20_000):
        path = tmp_path / f"{num_images}.beton"
        pixels = np.random.default_rng(0).integers(0, 256, (num_images, 8 * 8 * 3), dtype=np.uint8)
        with BetonWriter(path, capacity=num_images) as writer:
            for image in pixels:
                writer.append(StoredImage(image.tobytes(), 8, 8, RAW), label=-1)
            names = tuple(f"{row}.png" for row in range(num_images))
            writer.finish(
                encoding="raw", jpeg_quality=None, max_resolution=None, paths=names, labels=None, classes=None
            )
        script = [sys.executable, "-c", PEAK_OF_CACHING, str(path), str(tmp_path / f"{num_images}.zarr")]
        peaks.append(int(subprocess.run(script, check=True, capture_output=True, text=True).stdout))
    small, large = peaks
    assert large < 1.1 * small, peaks  # all embeddings at once would be a sixth more
