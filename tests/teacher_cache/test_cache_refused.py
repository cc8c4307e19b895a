"""What ``cache_teacher`` refuses or tells of: what is in the way, other settings, a small disk, teachers that do not fit."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from rob.common.errors import FailureError, MisuseError
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig
from rob.teacher_cache import asked, write
from rob.teacher_cache.cache import CacheConfig, CacheProgress, cache_teacher
from rob.teacher_cache.teachers import TeacherConfig
from support import tiny

pytestmark = pytest.mark.usefixtures("small_chunks")
IMAGES, VIEWS = 40, 2
PILLOW = LoaderConfig("torch", batch_size=3, workers=1)


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
    monkeypatch.setattr(write, "embedder", lambda *_: pytest.fail("the teacher ran"))
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


def test_a_disk_too_small_is_refused_before_anything_is_written(data, headless, tmp_path, monkeypatch) -> None:
    needed = IMAGES * VIEWS * 512
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 1, needed - 1))
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless)
    with pytest.raises(MisuseError, match=r"a\.zarr needs [\d,]+ bytes and [\d,]+ bytes are free"):
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
    with pytest.raises(
        MisuseError, match=r"a\.zarr, with the embeddings beside it until it is done, needs [\d,]+ bytes and"
    ):
        cache_teacher(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed, 0, needed))
    cache_teacher(config, CacheProgress(plan=plans.append))
    (plan,) = plans
    assert (plan.bytes_per_view, plan.temporary_bytes_per_view, plan.total_bytes) == (logits, embeddings, needed)


OTHERS = {
    r"seed is 0 in the store, not 1": {"seed": 1},
    r"view_ids": {"views": 1},
    r"encoding\.dtype": {"encoding": Encoding("embedding", "int8")},
    r"view_size": {"view_size": 24},
    r"precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(more_data, headless, tmp_path, finished) -> None:
    out = tmp_path / "a.zarr"
    config = tiny.tiny_cache_config(out, more_data, headless, loader=PILLOW)
    if finished:
        cache_teacher(config)
    else:
        stop_after(config, rows=16)
    before = tiny.contents(out)
    stands = "complete, with other settings" if finished else "begun with other settings"
    for named, changes in OTHERS.items():
        with pytest.raises(MisuseError, match=rf"a\.zarr (is already there and|was) {stands} \(.*{named}"):
            cache_teacher(tiny.tiny_cache_config(out, more_data, headless, loader=PILLOW, **changes))
        assert tiny.contents(out) == before


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


def test_a_chunk_that_no_codec_takes_is_refused_before_the_teacher_runs(data, headless, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(asked, "LARGEST_CHUNK", 100)
    monkeypatch.setattr(write, "embedder", lambda *_: pytest.fail("the teacher ran"))
    with pytest.raises(
        MisuseError, match=r"2 views of \d+ images have .* GB of 'embedding', and .* take fewer `views`$"
    ):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_no_numbers_are_refused_by_image(data, headless, tmp_path, monkeypatch, value) -> None:
    tiny.answering(monkeypatch, value, 17, 22)
    with pytest.raises(FailureError, match=r"for 2 of 8 images is NaN or infinite \(image ids 17, 22\)"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless)


def test_all_zero_embeddings_are_told_of(data, headless, tmp_path, monkeypatch) -> None:
    notes = []
    config = tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless)
    tiny.answering(monkeypatch, 0, 5, 17, 22)
    cache_teacher(config, CacheProgress(note=notes.append))
    (note,) = [note for note in notes if "all-zero" in note]
    assert note.startswith("6 views have an all-zero embedding")
    assert "`view_size` above 32" in note


@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_logits_need_prototypes(data, headless, tmp_path, kind) -> None:
    with pytest.raises(
        MisuseError, match=f"`encoding` {kind} needs prototype logits, .* give a number of `prototypes`"
    ):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless, encoding=Encoding(kind))


def test_prototypes_are_not_fitted_beside_published_ones(data, with_head, tmp_path) -> None:
    with pytest.raises(MisuseError, match="has 30 prototypes of its own"):
        tiny.tiny_store(tmp_path / "a.zarr", data, with_head, prototypes=6)


@pytest.mark.parametrize("kind", ["embedding", "dense"])
def test_more_prototypes_than_the_data_bear_are_refused_before_anything_is_cached(
    data, headless, tmp_path, kind
) -> None:
    with pytest.raises(MisuseError, match="`prototypes` 21 does not suit 80 embeddings: give from 2 to 20"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless, prototypes=21, encoding=Encoding(kind))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"views": 0}, {"prototypes": -1}])
def test_options_out_of_range(data, headless, tmp_path, option) -> None:
    with pytest.raises(MisuseError, match=f"`{next(iter(option))}` is"):
        tiny.tiny_cache_config(tmp_path / "a.zarr", data, headless, **option)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(data, headless, tmp_path) -> None:
    with pytest.raises(MisuseError, match="no CUDA device"):
        tiny.tiny_store(tmp_path / "a.zarr", data, headless, device="cuda")
