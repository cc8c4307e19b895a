"""A store that is given views, or the rows of images that were appended, is the one made in one go."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rob.common.bucket import Bucket
from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.places import place_of
from rob.common.store.encodings import Encoding
from rob.common.store.patches import PatchChoice
from rob.common.store.reader import TargetStore
from rob.common.views.config import LoaderConfig
from rob.teacher_cache import growth
from rob.teacher_cache.cache import CacheProgress, cache_teacher
from rob.teacher_cache.growth import Growth
from rob.teacher_cache.teachers import TeacherConfig
from rob.teacher_cache.verify import VerifyConfig, verify
from support import tiny

pytestmark = pytest.mark.usefixtures("small_chunks")
INT8, DENSE = Encoding("embedding", "int8"), Encoding("dense")
KILLS = [(30, 20), (45, 33)]
"""Requests at which a first and a second growth are killed."""
NUM, MORE = 36, 61
"""Images: four chunks and a half in shards of two, then seven and some."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[Beton, Beton]:
    """Packed images, and the same with others appended."""
    folder = tmp_path_factory.mktemp("grown")
    few = tiny.tiny_beton(folder, NUM, seed=3)
    few.path.rename(folder / "few.beton")
    (folder / "images-3.beton.json").rename(folder / "few.beton.json")
    for name in ("", ".json"):
        (folder / f"more.beton{name}").write_bytes((folder / f"few.beton{name}").read_bytes())
    more = tiny.tiny_images(folder / "images-3", MORE, seed=3)
    pack(PackConfig(str(more), folder / "more.beton", workers=1, append=True))
    return Beton(folder / "few.beton"), Beton(folder / "more.beton")


def killed_at(number: int) -> CacheProgress:
    looks: list[int] = []

    def rows(done: int, total: int) -> None:
        looks.append(done)
        if len(looks) == number:
            raise KeyboardInterrupt

    return CacheProgress(rows=rows)


@pytest.mark.parametrize(
    ("headed", "settings"),
    [
        (False, {"encoding": INT8}),
        (True, {"encoding": Encoding("topk", k=6)}),
        (False, {"patches": PatchChoice(patches="grid", patch_dim=16)}),
    ],
    ids=["embedding", "topk", "patches"],
)
def test_views_and_rows_that_are_added(grown, headless, with_head, tmp_path, headed, settings):
    """Killed in the middle of it, too; until all is there the store is what it was."""
    few, more = grown
    teacher: TeacherConfig = with_head if headed else headless
    loader = LoaderConfig(batch_size=4, workers=1)
    config = partial(tiny.tiny_cache_config, teacher=teacher, loader=loader, **settings)
    whole = tmp_path / "whole.zarr"
    cache_teacher(config(whole, more, views=4))
    store = tmp_path / "a.zarr"
    cache_teacher(config(store, few))
    before, notes = tiny.contents(store), []
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config(store, few, views=4), killed_at(3))
    assert tiny.contents(store) == before
    cache_teacher(config(store, few, views=4), CacheProgress(note=notes.append))
    assert f"{store}: views 2 to 3 are added to the 2 there" in notes
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config(store, more, views=4), killed_at(3))
    cache_teacher(config(store, more, views=4), CacheProgress(note=notes.append))
    assert f"{store}: rows 36 to 60 are added to those there" in notes
    if "patches" in settings:  # whose principal components are of the images that there were
        assert TargetStore.open(store).manifest == TargetStore.open(whole).manifest
    else:
        assert tiny.contents(store) == tiny.contents(whole)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_worker_that_comes_when_another_has_finished(grown, headless, tmp_path, monkeypatch):
    """What was summed up lies under pending/, which the first drops."""
    few, _ = grown
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", few, headless)
    cache_teacher(config())
    finish = Growth.finish

    def twice(*given):
        finish(*given)
        finish(*given)

    monkeypatch.setattr(Growth, "finish", twice)
    cache_teacher(config(views=3))
    assert TargetStore.open(tmp_path / "a.zarr").manifest.view_ids == (0, 1, 2)


def test_who_reads_a_store_that_grows_meanwhile_is_not_told_to_delete_it(grown, headless, tmp_path):
    few, _ = grown
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", few, headless)
    cache_teacher(config())
    store = TargetStore.open(tmp_path / "a.zarr")
    store.read(0, 1)
    cache_teacher(config(views=4))
    with pytest.raises(
        FailureError, match=rf"was replaced while it was read, and has 4 views of {NUM} images now: run"
    ):
        store.read(0, NUM)
    assert TargetStore.open(tmp_path / "a.zarr").verify() == []


def test_new_rows_that_are_no_numbers_are_named(grown, headless, tmp_path, monkeypatch):
    few, more = grown
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", teacher=headless)
    cache_teacher(config(data=few))
    tiny.answering(monkeypatch, np.nan, NUM + 1)
    with pytest.raises(FailureError, match=rf"\(image ids {NUM + 1}\)"):
        cache_teacher(config(data=more))


def test_both_at_once_by_parts_and_with_prototypes_that_stay(grown, headless, tmp_path):
    few, more = grown
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", teacher=headless, encoding=DENSE, prototypes=6)
    cache_teacher(config(data=few))
    was = TargetStore.open(tmp_path / "a.zarr")
    was_rows, was_prototypes, usage = was.read(0, NUM), was.prototypes, was.statistics["usage"]
    parts = [config(data=more, views=3, part=f"{number}/2") for number in (1, 2)]
    for part in (*parts, *parts):
        cache_teacher(part)
    store = TargetStore.open(tmp_path / "a.zarr")
    assert (store.manifest.num_images, store.manifest.view_ids) == (MORE, (0, 1, 2))
    np.testing.assert_array_equal(store.read(0, NUM)["logits"][:, :2], was_rows["logits"])
    np.testing.assert_array_equal(store.prototypes, was_prototypes)
    assert store.statistics["usage"].sum() == 3 * MORE
    assert (store.statistics["usage"] >= usage).all()
    assert store.verify() == []
    cache_teacher(config(data=more, views=3))  # nothing to do
    with pytest.raises(MisuseError, match="is already there and complete, with other settings"):
        cache_teacher(config(data=more, views=4, prototypes=7))


def test_what_is_not_more_of_the_same_is_refused(grown, data, headless, with_head, tmp_path):
    few, more = grown
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", teacher=headless)
    cache_teacher(config(data=few))
    before = tiny.contents(tmp_path)
    refusals: list[tuple[Any, str]] = [
        (config(data=data, views=4), "data_fingerprint"),  # more rows, and other ones
        (config(data=few, views=4, seed=1), "seed is 0 in the store, not 1"),
        (config(data=few, views=1), "view_ids"),
        (config(data=more, views=4, teacher=with_head), "weights_hash"),
    ]
    for other, message in refusals:
        with pytest.raises(MisuseError, match=f"complete, with other settings .*{message}"):
            cache_teacher(other)
    assert tiny.contents(tmp_path) == before
    with pytest.raises(
        MisuseError, match="has the first 36 of the 61 images, as others were appended since: run rob cache"
    ):
        TargetStore.open(tmp_path / "a.zarr").check_data(more.manifest)


def test_killed_while_the_stores_change_places(grown, headless, tmp_path, monkeypatch):
    """Before, or behind, or while what was there is dropped; where a system needs three steps for it, too."""
    few, _ = grown
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", few, headless)
    whole = tiny.contents(tiny.tiny_store(tmp_path / "whole.zarr", few, headless, views=3).path)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def then_dies(function: Callable) -> Callable:
        return lambda *given: (function(*given), dies())

    def in_three_steps(one: Path, other: Path) -> None:
        other.rename(growth.aside(other))
        dies()

    places = [(growth, "exchange", dies), (growth, "exchange", then_dies(growth.exchange))]
    places += [(growth, "exchange", in_three_steps), (shutil, "rmtree", dies)]
    for module, name, death in places:
        cache_teacher(config())
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, death)
            cache_teacher(config(views=3))
        cache_teacher(config(views=3))
        assert tiny.contents(tmp_path / "a.zarr") == whole
        shutil.rmtree(tmp_path / "a.zarr")


def test_grown_in_a_bucket(grown, headless, tmp_path, monkeypatch):
    """By two parts, killed at several of their requests, and in each step of the change of places: no file of another store, and
    none that is left over."""
    pytest.importorskip("obstore")
    few, more = grown
    whole = tiny.contents(tiny.tiny_store(tmp_path / "whole.zarr", more, headless, encoding=INT8, views=3).path)
    config = partial(tiny.tiny_cache_config, teacher=headless, encoding=INT8)
    left = [0]

    def lost(function: Callable) -> Callable:
        def asked(self, *given):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return function(self, *given)

        return asked

    for name in ("write", "remove", "copy_from"):
        monkeypatch.setattr(Bucket, name, lost(getattr(Bucket, name)))
    for number, kills in enumerate(KILLS):
        out = Path(f"memory://grown/{number}.zarr")
        cache_teacher(config(out, few))
        for data, views, kill in ((few, 3, kills[0]), (more, 3, kills[1])):
            parts = [config(out, data, views=views, part=f"{part}/2") for part in (1, 2)]
            left[0] = kill
            with suppress(KeyboardInterrupt):
                for part in parts:
                    cache_teacher(part)
            left[0] = 0
            for part in parts:
                cache_teacher(part)
        place = place_of("memory://grown")
        found = {name: place.read(name) for name in place.names()}
        assert found == {f"{number}.zarr/{name}": data for name, data in whole.items()}
        place.remove_all()


def test_verified_against_the_teacher(grown, headless, tmp_path):
    few, more = grown
    tiny.tiny_store(tmp_path / "a.zarr", few, headless)
    tiny.tiny_store(tmp_path / "a.zarr", more, headless, views=3)
    assert verify(VerifyConfig(tmp_path / "a.zarr", more.path, headless, device="cpu")).lowest_cosine > 0.9999
