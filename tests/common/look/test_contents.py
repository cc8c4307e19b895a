"""The tables of ``rob inspect``."""

import re
from dataclasses import replace

import pytest
from PIL import Image

from rob.common.errors import MisuseError
from rob.common.images.pack import PackConfig, pack
from rob.common.look.contents import inspect
from rob.common.store.encodings import Encoding
from rob.common.store.writer import StoreWriter
from support import tiny
from support.packing import packed
from support.stores import reencoded


def test_table_of_packed_images(data) -> None:
    inspection = inspect(data.path)
    rows = dict(inspection.rows)
    assert inspection.title == f"{data.path}: packed images"
    assert rows["images"] == "24"
    assert rows["width x height"] == "32 x 32 px"
    assert rows["classes"] == "2: class0, class1"
    assert rows["images a class"] == "12"
    assert rows["stored as"].startswith("JPEG")
    assert rows["paths"] == f"{data.manifest.paths[0]}, ..., {data.manifest.paths[-1]}"
    assert data.manifest.fingerprint.startswith(rows["fingerprint"])
    assert rows["size on disk"].startswith(f"{data.path.stat().st_size / 1000:.1f} kB")
    assert "skipped" not in rows


def test_table_of_many_classes_sizes_and_broken_images(tmp_path) -> None:
    images = tiny.tiny_images(tmp_path / "images", 30, classes=15)
    Image.new("RGB", (50, 40)).save(images / "class3" / "wide.png")
    (images / "class3" / "bad.jpg").write_bytes(b"no image")
    pack(PackConfig(str(images), tmp_path / "a.beton", raw=True, skip_bad=True, max_resolution=50, workers=1))
    rows = dict(inspect(tmp_path / "a.beton").rows)
    assert rows["classes"].startswith("15: class0, class1, class10, class11, class12, ..., ")
    assert rows["images a class"] == "2 to 3"
    assert rows["width x height"] == "32 to 50 x 32 to 40 px"
    assert rows["stored as"] == "raw pixels"
    assert rows["longest side"] == "at most 50 px"
    assert rows["skipped"] == "1 broken: class3/bad.jpg"


def test_table_of_a_store(store, data) -> None:
    inspection = inspect(store.path)
    rows = dict(inspection.rows)
    assert inspection.title == f"{store.path}: target store"
    assert rows["images x views"] == "24 x 2"
    assert rows["teacher"] == f"{tiny.TEACHER}, weights {store.manifest.weights_hash[:16]}, fp32"
    assert rows["embedding"] == f"24 dimensions, head: {store.manifest.head}"
    assert rows["prototypes"] == "40, teacher temperature 0.07"
    assert rows["encoding"] == "embedding, float16"
    assert rows["bytes a view"] == "48 in memory, 2.3 kB in all"
    assert rows["recipe"].startswith("dino, seed 0, 32 px, ")
    assert data.manifest.fingerprint.startswith(rows["data fingerprint"])
    used = (store.statistics["usage"] > 0).mean()
    assert rows["prototypes used"].startswith(f"{used:.1%} ")
    on_disk = sum(file.stat().st_size for file in (store.path / "embedding").rglob("*") if file.is_file())
    assert f", {on_disk / 48:,.0f} bytes a view ({on_disk / (48 * 48):.0%})" in rows["targets on disk"]


@pytest.mark.parametrize(
    ("encoding", "described"),
    [
        (Encoding("topk", k=8), "topk, 8 of 40 logits, tail at temperatures 0.025, 0.04, 0.055, 0.07, 0.1"),
        (Encoding("dense"), "dense, 40 logits"),
    ],
    ids=["topk", "dense"],
)
def test_tables_of_logits(store, tmp_path, encoding, described) -> None:
    assert dict(inspect(reencoded(store, tmp_path / "a.zarr", encoding).path).rows)["encoding"] == described


def test_table_of_a_half_written_store(store, tmp_path) -> None:
    writer = StoreWriter.open_or_resume(tmp_path / "a.zarr", replace(store.manifest, chunk_rows=8))
    writer.append(store.read(0, 8))
    writer.append(store.read(8, 16))
    inspection = inspect(tmp_path / "a.zarr")
    rows = dict(inspection.rows)
    assert inspection.kind == "half-written target store"
    assert rows["done"] == "16 of 24 images (67%): run rob cache-teacher again to go on"
    assert rows["images x views"] == "24 x 2"


@pytest.mark.parametrize("make", ["nothing", "file", "folder"])
def test_anything_else_is_refused(tmp_path, make) -> None:
    path = tmp_path / "a"
    if make == "file":
        path.write_text("hello")
    elif make == "folder":
        path.mkdir()
    with pytest.raises(MisuseError, match=re.escape(str(path))):
        inspect(path)


def test_images_without_a_label_are_no_class_of_their_own(tmp_path) -> None:
    tiny.tiny_images(tmp_path, 3)
    names = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.jpg"))]
    (tmp_path / "list.csv").write_text(f"path,label\n{names[0]},cat\n{names[1]},\n{names[2]},dog\n")
    rows = dict(inspect(packed(tmp_path / "list.csv", tmp_path / "out").path).rows)
    assert (rows["classes"], rows["without a label"]) == ("2: cat, dog", "1")
