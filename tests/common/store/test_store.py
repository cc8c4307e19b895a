"""The target store: round trip, refusals, damage, and being killed at any moment."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr

from rob.common.errors import FailureError, MisuseError
from rob.common.store.manifest import differing
from rob.common.store.reader import TargetStore, add_prototypes
from rob.common.store.writer import StoreWriter
from support.stores import ENCODINGS, PROTOTYPES, expected_rows, manifest_of, prototypes, write

# ---- round trip ----


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
@pytest.mark.parametrize("num_images", [70, 48, 5])
def test_what_is_appended_is_read(tmp_path, encoding, num_images):
    manifest = manifest_of(encoding, num_images)
    write(tmp_path / "t.zarr", manifest)
    store, expected = TargetStore.open(tmp_path / "t.zarr"), expected_rows(manifest)
    assert store.manifest == manifest
    assert store.verify() == []
    for start, stop in [(0, num_images), (0, 1), (num_images - 1, num_images), (3, min(30, num_images))]:
        for name, values in store.read(start, stop).items():
            np.testing.assert_array_equal(values, expected[name][start:stop])
    ids = np.random.default_rng(0).integers(0, num_images, 50)
    for name, values in store.rows(ids).items():
        np.testing.assert_array_equal(values, expected[name][ids])
    np.testing.assert_array_equal(store.prototypes, prototypes())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
def test_zarr_reads_and_checks_the_same_arrays(tmp_path, encoding):
    manifest = manifest_of(encoding)
    write(tmp_path / "t.zarr", manifest)
    group = zarr.open_group(tmp_path / "t.zarr", mode="r")
    assert dict(group.attrs) == manifest.to_json()
    for name, values in expected_rows(manifest).items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.chunks[0], array.shards[0]) == (8, 24)  # type: ignore[index]
        np.testing.assert_array_equal(array[:], values)


def test_statistics_are_summed_over_all_chunks(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    write(tmp_path / "t.zarr", manifest, stop=40)  # one shard, and two chunks journalled
    write(tmp_path / "t.zarr", manifest)
    statistics = TargetStore.open(tmp_path / "t.zarr").statistics
    assert statistics["rows"] == 70
    embedding = expected_rows(manifest)["embedding"].astype(np.float64)
    np.testing.assert_allclose(statistics["embedding_sum"], embedding.sum((0, 1)), atol=1e-12)


def test_prototypes_are_added_to_a_complete_store(tmp_path):
    path = tmp_path / "t.zarr"
    write(path, manifest_of(ENCODINGS[1], num_prototypes=0))
    assert TargetStore.open(path).prototypes is None
    add_prototypes(
        path, prototypes().numpy(), head="kmeans", teacher_temp=0.05, statistics={"usage": np.arange(PROTOTYPES)}
    )
    store = TargetStore.open(path)
    assert (store.manifest.num_prototypes, store.manifest.head) == (PROTOTYPES, "kmeans")
    np.testing.assert_array_equal(store.prototypes, prototypes())
    assert set(store.statistics) == {"embedding_sum", "rows", "usage"}
    assert store.verify() == []
    with pytest.raises(MisuseError, match="has prototypes already"):
        add_prototypes(path, prototypes().numpy(), head="kmeans", teacher_temp=0.05)


# ---- refusals ----


def test_opening_refuses_what_is_no_whole_store(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    with pytest.raises(MisuseError, match=r"no target store at .*missing\.zarr"):
        TargetStore.open(tmp_path / "missing.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MisuseError, match="not a target store"):
        TargetStore.open(tmp_path / "folder")
    zarr.create_group(tmp_path / "other.zarr", attributes={"some": "group"})
    with pytest.raises(MisuseError, match="not a target store"):
        TargetStore.open(tmp_path / "other.zarr")
    write(tmp_path / "half.zarr", manifest, stop=40)
    with pytest.raises(MisuseError, match="half-written, 40 of 70 rows are done: run rob cache-teacher again"):
        TargetStore.open(tmp_path / "half.zarr")
    write(tmp_path / "old.zarr", manifest)
    group = json.loads((tmp_path / "old.zarr" / "zarr.json").read_text())
    group["attributes"]["format_version"] = 99
    (tmp_path / "old.zarr" / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(MisuseError, match="format version 99, this rob reads version 1"):
        TargetStore.open(tmp_path / "old.zarr")


def test_check_names_what_differs(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    write(tmp_path / "t.zarr", manifest)
    store = TargetStore.open(tmp_path / "t.zarr")
    store.check(data_fingerprint="ab12", recipe={"name": "dino", "global_scale": (0.14, 1.0)}, teacher="tiny")
    with pytest.raises(MisuseError, match="another data set: data_fingerprint is 'ab12' in the store, not 'zz'"):
        store.check(data_fingerprint="zz")
    with pytest.raises(MisuseError, match=r"another recipe: recipe.global_scale is \[0.14, 1.0\] in the store"):
        store.check(recipe={"name": "dino", "global_scale": (0.25, 1.0)})
    with pytest.raises(MisuseError, match="another teacher"):
        store.check(teacher="vit_base")


def test_a_writer_refuses_what_it_would_overwrite(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    write(tmp_path / "t.zarr", manifest, stop=16)
    with pytest.raises(MisuseError, match=r"begun with other settings .*seed is 3 in the store, not 4"):
        StoreWriter.open_or_resume(tmp_path / "t.zarr", replace(manifest, seed=4))
    assert StoreWriter.open_or_resume(tmp_path / "t.zarr", replace(manifest, versions={"torch": "3"})).rows_done == 16
    write(tmp_path / "t.zarr", manifest)
    with pytest.raises(MisuseError, match="already there and complete"):
        StoreWriter.open_or_resume(tmp_path / "t.zarr", manifest)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(MisuseError, match="not a target store"):
        StoreWriter.open_or_resume(tmp_path / "thesis", manifest)


def test_differences_are_named_one_by_one_and_kept_short():
    stored = {"recipe": {"crops": [{"blur": 1.0, "size": 224}]}, "view_ids": [0, 1]}
    asked = {"recipe": {"crops": [{"blur": 0.5, "size": 224}]}, "view_ids": list(range(10**6))}
    crops, view_ids = differing(stored, asked)
    assert crops == "recipe.crops.0.blur is 1.0 in the store, not 0.5"
    assert view_ids.startswith("view_ids is [0, 1] in the store, not [0, 1, 2, ")
    assert len(view_ids) < 150


# ---- damage ----


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    manifest = manifest_of(ENCODINGS[1])
    write(tmp_path / "t.zarr", manifest)
    store = TargetStore.open(tmp_path / "t.zarr")
    shard = tmp_path / "t.zarr" / "embedding" / "c" / "1" / "0" / "0"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[5] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-30])
    else:
        shard.unlink()
    store.read(0, 24)
    with pytest.raises(FailureError, match=r"chunk 3 of array 'embedding' \(images 24 to 31\) is damaged"):
        store.read(24, 25)
    assert len(store.verify()) == (1 if damage == "flip" else 3)


@pytest.mark.parametrize(
    "left", ["", '{"attributes": {"data_f', "[1]", "\udcff"], ids=["empty", "cut", "other", "binary"]
)
def test_a_cut_manifest_is_one_sentence(tmp_path, left):
    write(tmp_path / "t.zarr", manifest_of(ENCODINGS[0]))
    (tmp_path / "t.zarr" / "zarr.json").write_bytes(left.encode(errors="surrogateescape"))
    with pytest.raises(FailureError, match=r"t\.zarr is damaged, its zarr\.json is cut or no JSON: delete the store"):
        TargetStore.open(tmp_path / "t.zarr")
    write(tmp_path / "half.zarr", manifest_of(ENCODINGS[0]), stop=16)
    (tmp_path / "half.zarr" / "pending" / "manifest.json").write_bytes(left.encode(errors="surrogateescape"))
    with pytest.raises(FailureError, match=r"its pending/manifest\.json is cut or no JSON"):
        TargetStore.open(tmp_path / "half.zarr")


def test_what_a_store_lacks_is_named(tmp_path):
    path = tmp_path / "t.zarr"
    write(path, manifest_of(ENCODINGS[0]))
    shutil.rmtree(path / "statistics")
    with pytest.raises(FailureError, match=r"array 'statistics/embedding_sum' is missing: delete the store and run"):
        _ = TargetStore.open(path).statistics
    group = json.loads((path / "zarr.json").read_text())
    del group["attributes"]["view_size"]
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(FailureError, match="its manifest lacks view_size: delete the store"):
        TargetStore.open(path)
