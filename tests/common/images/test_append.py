"""Images that are added to a packed file: behind those it has, as one pack of all in this order has them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images import append, beton
from rob.common.images import pack as packing
from rob.common.images.beton import Beton
from rob.common.images.config import PackConfig
from rob.common.images.pack import pack
from rob.common.images.sources import open_source
from support.packing import PHOTO, packed
from support.tiny import tiny_images


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Twelve images of two classes; the same and nine more, some in a class that sorts between."""
    few, all_ = tiny_images(tmp_path / "few", 12), tiny_images(tmp_path / "all", 18)
    for number in range(3):
        (all_ / "class0b").mkdir(exist_ok=True)
        Image.fromarray(PHOTO[number:]).save(all_ / "class0b" / f"{number}.png")
    return few, all_


def added(source: Path, out: Path, **options) -> Beton:
    pack(PackConfig(str(source), out / "data.beton", append=True, **options))
    return Beton(out / "data.beton")


def test_rows_that_are_added(folders, tmp_path):
    few, all_ = folders
    first = packed(few, tmp_path, shuffle=True)
    was, images = first.manifest, [first.image(row) for row in range(12)]
    grown = added(all_, tmp_path)
    found = grown.manifest
    assert found.paths[:12] == was.paths
    assert sorted(found.paths) == sorted(open_source(PackConfig(str(all_), all_)).paths)
    assert found.paths[12:] != tuple(sorted(found.paths[12:]))  # shuffled
    assert found.classes == ("class0", "class1", "class0b")  # those that there were keep their numbers
    assert [found.classes[label] for label in grown.labels] == [path.split("/")[0] for path in found.paths]
    assert all(np.array_equal(grown.image(row), images[row]) for row in range(12))
    assert found.grown == ((12, was.fingerprint),)
    assert "grown" not in was.to_dict()
    again = added(tiny_images(tmp_path / "others", 22), tmp_path)
    assert again.manifest.grown == ((12, was.fingerprint), (21, found.fingerprint))

    source = open_source(PackConfig(str(all_), all_))
    ordered = replace(source, paths=again.manifest.paths[:21])
    pack(PackConfig(str(all_), tmp_path / "one.beton", shuffle=False), source=ordered)
    one = Beton(tmp_path / "one.beton").manifest
    assert one.fingerprint == found.fingerprint
    assert one.size_bytes == found.size_bytes


def test_the_file_is_that_of_one_pack(folders, tmp_path):
    few, all_ = folders
    shutil.rmtree(all_ / "class0b")
    packed(few, tmp_path)
    grown = added(all_, tmp_path)
    source = replace(open_source(PackConfig(str(all_), all_)), paths=grown.manifest.paths)
    pack(PackConfig(str(all_), tmp_path / "one.beton", shuffle=False), source=source)
    files = [(tmp_path / name).read_bytes() for name in ("data.beton", "one.beton")]
    seal = beton.HEADER.itemsize + beton.FIELD.itemsize + 17  # of the manifest, which says what it has grown from
    assert len(files[0]) == len(files[1])
    assert [file[:seal] + file[seal + 8 :] for file in files[:1]] == [
        file[:seal] + file[seal + 8 :] for file in files[1:]
    ]
    manifests = [json.loads((tmp_path / f"{name}.beton.json").read_text()) for name in ("data", "one")]
    assert manifests[0].pop("grown") == [[12, Beton(tmp_path / "data.beton").manifest.grown[0][1]]]
    assert manifests[0] == manifests[1]


def test_a_kill_leaves_what_there_was(folders, tmp_path, monkeypatch):
    few, all_ = folders
    packed(few, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("data*")}
    for module, name in ((append.Earlier, "copy_to"), (packing, "_map_in_order"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, dies)
            added(all_, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("data*")} == before
    assert added(all_, tmp_path).num_images == 21


def dies(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_added_is_refused(folders, tmp_path):
    few, all_ = folders
    with pytest.raises(MisuseError, match=r"data\.beton: no such file"):
        added(few, tmp_path)
    packed(few, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("data*")}
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(PHOTO).save(flat / "a.png")
    refusals = [
        (few, {}, r"each of the 12 images is in .*data\.beton already: nothing to append"),
        (all_, {"raw": True}, r"`raw` is True, and .*data\.beton was packed with False: append with the same"),
        (all_, {"max_resolution": 8}, "`max_resolution` is 8, and .* was packed with None"),
        (all_, {"jpeg_quality": 50}, "`jpeg_quality` is 50, and .* was packed with 95"),
        (flat, {}, "has classes, and .*flat none: append a folder of the same form"),
    ]
    for source, options, message in refusals:
        with pytest.raises(MisuseError, match=message):
            added(source, tmp_path, **options)
    Image.fromarray(PHOTO).save(all_ / "class0" / "00000.jpg")
    with pytest.raises(
        MisuseError, match=r"class0/00000\.jpg is in .*data\.beton already, as another image: rename one"
    ):
        added(all_, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("data*")} == before
    data = Beton(tmp_path / "data.beton")
    with open(data.path, "r+b") as file:
        file.seek(int(data.pointers[5]) + 100)
        file.write(b"\0\0\0\0")
    shutil.copyfile(few / "class0" / "00000.jpg", all_ / "class0" / "00000.jpg")
    with pytest.raises(FailureError, match="is damaged, its fingerprint is another: rob check says where"):
        added(all_, tmp_path)
