"""A pack that was broken off goes on, to the bytes of one that was not; what cannot be used goes."""

from pathlib import Path

import pytest

from rob.common.errors import FailureError
from rob.common.images import resume
from rob.common.images.config import PackConfig
from rob.common.images.pack import pack
from rob.common.images.sources import open_source
from support.tiny import contents, tiny_images


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twenty images, of which the twelfth to be packed is broken; rows are written every four."""
    monkeypatch.setattr(resume, "EVERY", 4)
    images = tiny_images(tmp_path / "images", 20)
    (images / open_source(PackConfig(str(images), tmp_path / "a.beton")).shuffled().paths[11]).write_bytes(b"broken")
    return images


def run(folder: Path, out: Path, stop_at: int = 0, **options) -> tuple[int, list[str]]:
    """How many images the progress began with, and the notes."""
    said, seen = [], []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == stop_at:
            raise KeyboardInterrupt

    config = PackConfig(str(folder), out / "data.beton", workers=1, **options)
    try:
        pack(config, progress, note=said.append)
    except KeyboardInterrupt:
        assert stop_at
    return seen[0] if seen else 0, said


def test_it_goes_on_to_the_same_bytes(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(folder, whole, skip_bad=True)
    _, said = run(folder, out, stop_at=7, skip_bad=True)
    assert said == ["7 images are kept: the same command goes on from there"]
    assert sorted(contents(out)) == [".data.beton.half", ".data.beton.half.rows"]
    first, said = run(folder, out, stop_at=15, skip_bad=True)
    assert (first, said[0]) == (8, "7 of 20 images were packed before: goes on from there")
    for ending in ("", ".rows"):  # as a kill leaves it
        (out / f".data.beton.half{ending}").rename(out / f".data.beton.tmp-1{ending}")
    first, said = run(folder, out, skip_bad=True)
    assert (first, said) == (16, ["15 of 20 images were packed before: goes on from there"])
    assert contents(out) == contents(whole)


def test_a_broken_image_costs_what_is_behind_it(folder, tmp_path):
    """With or without it being left out then."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    for skip_bad, known in ((False, 0), (False, 11), (True, 11)):
        said = []
        config = PackConfig(str(folder), out / "data.beton", workers=1, skip_bad=skip_bad)
        if skip_bad:
            pack(config, note=said.append)
        else:
            with pytest.raises(FailureError, match="broken image"):
                pack(config, note=said.append)
        assert (f"{known} of 20 images were packed before: goes on from there" in said) == bool(known)
    run(folder, whole, skip_bad=True)
    assert contents(out) == contents(whole)
    run(folder, out, stop_at=16, skip_bad=True)
    with pytest.raises(FailureError, match="broken image"):  # left out then, wanted now
        run(folder, out)


def test_what_is_of_another_pack_or_damaged_is_not_used(folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(folder, out, stop_at=9, skip_bad=True)
    first, _ = run(folder, out, skip_bad=True, raw=True)
    assert first == 1
    assert sorted(contents(out)) == ["data.beton", "data.beton.json"]
    run(folder, out, stop_at=9, skip_bad=True)
    left = out / ".data.beton.half"
    data = bytearray(left.read_bytes())
    data[-100] ^= 1  # in the ninth image
    left.write_bytes(data)
    first, _ = run(folder, out, skip_bad=True)
    assert first == 9
    run(folder, whole, skip_bad=True)
    assert contents(out) == contents(whole)


def test_a_list_that_has_changed_is_packed_from_the_start(folder, tmp_path):
    """Its labels may be others."""
    names = [f"images/{path.relative_to(folder)}" for path in sorted(folder.rglob("*.jpg"))]
    for label in (1, 2):
        (tmp_path / "list.csv").write_text("".join(f"{name},{row % 2 * label}\n" for row, name in enumerate(names)))
        first, _ = run(tmp_path / "list.csv", tmp_path / "out", stop_at=9, skip_bad=True)
        assert first == 1
    first, _ = run(tmp_path / "list.csv", tmp_path / "out", skip_bad=True)
    assert first == 10


@pytest.mark.parametrize("option", ["label_column", "image_column"])
def test_another_column_is_packed_from_the_start(folder, tmp_path, option):
    names = [f"images/{path.relative_to(folder)}" for path in sorted(folder.rglob("*.jpg"))]
    rows = "".join(f"{name},{name},{row % 2},{row % 3}\n" for row, name in enumerate(names))
    (tmp_path / "list.csv").write_text(f"path,same,two,three\n{rows}")
    columns = {"image_column": "path", "label_column": "two"}
    first, _ = run(tmp_path / "list.csv", tmp_path / "out", stop_at=9, skip_bad=True, **columns)
    columns[option] = {"image_column": "same", "label_column": "three"}[option]
    again, _ = run(tmp_path / "list.csv", tmp_path / "out", skip_bad=True, **columns)
    assert (first, again) == (1, 1)
