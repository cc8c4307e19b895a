"""Files that are there whole or not at all, and naming what differs."""

import errno
import os

import pytest

from rob.common import files
from rob.common.errors import FailureError
from rob.common.files import differences, first_difference, replacing, whole_file


def test_a_file_takes_its_place_once_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "file"
    for content in (b"one", b"other"):
        before = path.read_bytes() if path.exists() else None
        with whole_file(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert [found.name for found in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, ValueError("bad"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_file_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    with pytest.raises(error if isinstance(error, type) else type(error)), whole_file(path, tmp_path / ".part") as file:
        file.write(b"half")
        raise error
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"earlier"


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with whole_file(tmp_path / "file") as file:
        file.write(b"content")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize(("earlier", "kept"), [(True, "; the earlier file is kept"), (False, "")])
def test_a_full_disk_is_said_in_the_systems_words(tmp_path, earlier, kept):
    path = tmp_path / "file"
    if earlier:
        path.write_bytes(b"earlier")
    with pytest.raises(FailureError) as caught, replacing(path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None  # torch.save's, which says less
    assert str(caught.value) == f"cannot write {path}: No space left on device{kept}"
    assert len(list(tmp_path.iterdir())) == earlier


def test_what_differs_is_named_by_its_place():
    old = {"a": 1, "gone": 2, "crops": [{"blur": 1.0, "size": 2}], "ids": [1, 2], "recipe": {"flip": 0.5, "none": None}}
    new = {"a": 1, "crops": [{"blur": 0.5, "size": 2}, {"size": 3}], "ids": [1], "recipe": {"flip": 0.0}, "more": "x"}
    assert list(differences(old, new)) == [
        ("crops.0.blur", 1.0, 0.5),
        ("crops.1", None, {"size": 3}),
        ("ids", [1, 2], [1]),
        ("recipe.flip", 0.5, 0.0),
        ("more", None, "x"),
        ("gone", 2, None),
    ]
    assert first_difference(old, new) == ("crops.0.blur", 1.0, 0.5)
    assert first_difference(old, old) is None
    dino, mild = (
        {"recipe": {"size": size, "blur": blur, "name": n}} for n, size, blur in (("dino", 9, 1), ("mild", 8, 0))
    )
    assert list(differences(dino, mild)) == [("recipe.name", "dino", "mild")]


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Its last holder removed it between our opening and our locking: a third would lock the next file of this name."""
    path, removed = tmp_path / "lock", []

    def lock(descriptor, shared=False):
        if not removed:
            removed.append(descriptor)
            path.unlink()
        return True

    monkeypatch.setattr(files, "lock", lock)
    descriptor = files.open_locked(path)
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)
