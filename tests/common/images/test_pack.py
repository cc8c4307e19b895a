import errno
import hashlib
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import MOST_OF_A_TASK, PackConfig, _map_in_order, pack
from rob.common.images.resume import PartialPack
from support.packing import PHOTO, jpeg_bytes, packed

# --- the folder: order, labels, subsets ---


def test_rows_are_in_sorted_path_order_with_labels_by_folder(image_folder, small_beton):
    assert small_beton.manifest.paths == tuple(
        sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.jpg"))
    )
    assert small_beton.manifest.classes == ("cat", "dog", "emu")
    assert small_beton.manifest.labels == tuple(small_beton.labels)


def test_rows_are_shuffled_with_their_paths_and_labels(image_folder, tmp_path, small_beton):
    first = packed(image_folder, tmp_path, shuffle=True)
    content = first.path.read_bytes()
    paths, kept = first.manifest.paths, small_beton.manifest.paths
    assert sorted(paths) == sorted(kept)
    assert paths != kept
    assert len(set(first.labels[:8])) == len(set(first.labels[-8:])) == 3
    for row in range(24):
        assert np.array_equal(first.image(row), small_beton.image(kept.index(paths[row])))
        assert first.manifest.classes[first.labels[row]] == paths[row].split("/")[0]
    packed(image_folder, tmp_path, shuffle=True, workers=1)
    assert first.path.read_bytes() == content


@pytest.mark.parametrize("places", [("a.jpg", "b.jpg"), ("a.jpg", "x/b.jpg"), ("x/y/a.jpg", "z/b.jpg")])
def test_folders_of_other_shapes_have_no_labels(tmp_path, places):
    for place in places:
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PHOTO).save(tmp_path / "in" / place)
    data = packed(tmp_path / "in", tmp_path)
    assert data.manifest.paths == tuple(sorted(places))
    assert data.labels is data.manifest.labels is data.manifest.classes is None


def test_hidden_files_and_other_extensions_are_left_out_and_links_followed(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for path in (folder / "a.JPG", folder / "._a.jpg", folder / "notes.txt", elsewhere / "b.png"):
        Image.fromarray(PHOTO).save(path, "PNG")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    assert packed(folder, tmp_path).manifest.paths == ("a.JPG", "linked/b.png")


def test_limit_spreads_over_the_classes(image_folder, tmp_path):
    data = packed(image_folder, tmp_path, limit=6)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert packed(image_folder, tmp_path, limit=100).num_images == 24


def test_bytes_do_not_depend_on_workers(image_folder, tmp_path):
    def digest(workers: int) -> list[str]:
        packed(image_folder, tmp_path, max_resolution=40, workers=workers)
        return [
            hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("data.beton", "data.beton.json")
        ]

    assert digest(1) == digest(2) == digest(7)


def test_progress_counts_every_image(image_folder, tmp_path):
    calls = []
    pack(PackConfig(str(image_folder), tmp_path / "data.beton"), lambda *numbers: calls.append(numbers))
    assert calls == [(done, 24) for done in range(1, 25)]


# --- bad input ---


@pytest.fixture
def broken_folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    good = jpeg_bytes(Image.fromarray(PHOTO))
    files = {
        "a/1.jpg": good,
        "a/2.jpg": good[:-40],
        "b/3.png": b"not an image",
        "b/4.jpg": b"",
        "c/5.jpg": good,
        "c/6.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a/2.jpg", "truncated"), ("b/3.png", "not an image"), ("b/4.jpg", "the file is empty"), ("c/6.png", "")],
)
def test_broken_image_stops_the_pack_with_its_path(broken_folder, tmp_path, name, reason):
    for path in broken_folder.rglob("*"):
        if path.is_file() and path != broken_folder / name and "1.jpg" not in path.name:
            path.unlink()
    with pytest.raises(FailureError, match=rf"broken image {broken_folder}/{name}: .*{reason}.* `skip_bad`"):
        packed(broken_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_skip_bad_leaves_broken_images_out_and_lists_them(broken_folder, tmp_path):
    data = packed(broken_folder, tmp_path, skip_bad=True)
    assert data.manifest.paths == ("a/1.jpg", "c/5.jpg")
    assert data.manifest.skipped == ("a/2.jpg", "b/3.png", "b/4.jpg", "c/6.png")
    assert data.manifest.classes == ("a", "b", "c")
    assert data.labels.tolist() == [0, 2]
    assert data.image(1).shape == PHOTO.shape


def test_only_broken_images(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no")
    with pytest.raises(FailureError, match="each of the 1 images is broken"):
        packed(tmp_path / "in", tmp_path, skip_bad=True)


def test_image_beyond_the_format_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("1", (65_536, 1)).save(tmp_path / "in" / "long.png")
    with pytest.raises(FailureError, match=r"long\.png: 65536 x 1 pixels, .* `max_resolution`"):
        packed(tmp_path / "in", tmp_path)
    assert packed(tmp_path / "in", tmp_path, max_resolution=100).image(0).shape == (1, 100, 3)


def test_empty_folder_and_folder_without_images(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(MisuseError, match=r"in: the folder is empty; looked for \.jpg"):
        packed(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "readme.txt").touch()
    with pytest.raises(MisuseError, match=r"in: no image in it or below; looked for \.jpg \.jpeg \.jpe"):
        packed(tmp_path / "in", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"nowhere: no such file or folder; SOURCE is a folder of images, .* or one of cifar10, "),
        (__file__, "a file, not a folder"),
        ("cifar-10", "unknown folder or named data set 'cifar-10': did you mean cifar10"),
    ],
)
def test_wrong_source(tmp_path, source, message):
    with pytest.raises(MisuseError, match=message):
        packed(source, tmp_path)


@pytest.mark.parametrize("option", [{"jpeg_quality": 0}, {"jpeg_quality": 101}, {"max_resolution": 0}, {"limit": 0}])
def test_wrong_options(image_folder, tmp_path, option):
    name, value = next(iter(option.items()))
    with pytest.raises(MisuseError, match=f"`{name}` is {value}, expected at {'most' if value else 'least'} 1"):
        packed(image_folder, tmp_path, **option)


def test_workers_are_0_for_every_core_or_more(image_folder, tmp_path):
    assert packed(image_folder, tmp_path, workers=0).num_images == 24
    with pytest.raises(MisuseError, match="`workers` is -1, expected at least 0"):
        packed(image_folder, tmp_path, workers=-1)


@pytest.mark.parametrize("name", ["out.txt", "photo.jpg", "beton"])
def test_out_must_be_named_beton(image_folder, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(MisuseError, match=rf"{name}: expected a name that ends with \.beton"):
        pack(PackConfig(str(image_folder), tmp_path / name))
    assert (tmp_path / name).read_bytes() == b"mine"


def test_out_must_not_be_a_folder(image_folder, tmp_path):
    with pytest.raises(MisuseError, match="a folder; name the file"):
        pack(PackConfig(str(image_folder), tmp_path))


def test_full_disk_is_one_sentence_and_keeps_the_old_file(image_folder, tmp_path):
    before = packed(image_folder, tmp_path, limit=2).manifest
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(FailureError, match=r"could not write .*data\.beton: File too large; nothing was kept"):
            packed(image_folder, tmp_path, raw=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Beton(tmp_path / "data.beton").manifest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.beton", "data.beton.json"]


def test_a_disk_that_is_only_read_is_one_sentence_about_the_file_to_write(image_folder, tmp_path, monkeypatch):
    def refused(path, key):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".data.beton.half.rows"))

    monkeypatch.setattr(PartialPack, "of", refused)
    with pytest.raises(FailureError, match=r"could not write .*/data\.beton: Read-only file system"):
        packed(image_folder, tmp_path)


def test_a_thread_gets_several_images_where_they_take_little_time():
    """Handing one over takes as long as packing a small one."""
    for function, count, largest in ((str, 500, MOST_OF_A_TASK), (lambda item: time.sleep(0.005) or str(item), 12, 1)):
        sizes = []
        with ThreadPoolExecutor(2) as pool:
            submit = pool.submit
            pool.submit = lambda task, some, submit=submit, sizes=sizes: sizes.append(len(some)) or submit(task, some)
            assert list(_map_in_order(pool, function, range(count), 8)) == [str(item) for item in range(count)]
        assert (max(sizes), sum(sizes)) == (largest, count)
