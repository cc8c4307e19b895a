import errno
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rob.common.errors import FailureError, MisuseError
from rob.common.images import beton
from rob.common.images.beton import Beton, BetonWriter, StoredImage, manifest_path
from rob.common.images.pack import PackConfig, pack
from support import tiny
from support.photographs import photograph

DESCRIPTION = {"encoding": "raw", "jpeg_quality": None, "max_resolution": None, "labels": None, "classes": None}


def raw_image(height: int, width: int, seed: int = 0) -> StoredImage:
    return StoredImage(photograph(seed, height, width).tobytes(), height, width, beton.RAW)


def write(path: Path, images: list[StoredImage]) -> None:
    with BetonWriter(path, capacity=len(images)) as writer:
        for image in images:
            writer.append(image)
        writer.finish(paths=tuple(f"{row}.png" for row in range(len(images))), **DESCRIPTION)


def copy(data: Beton, folder: Path) -> Path:
    shutil.copy(manifest_path(data.path), folder)
    return Path(shutil.copy(data.path, folder))


def test_record_layouts_are_those_of_ffcv():
    types = pytest.importorskip("ffcv.types")
    fields = pytest.importorskip("ffcv.fields")
    for ours, theirs in ((beton.HEADER, types.HeaderType), (beton.FIELD, types.FieldDescType)):
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[n][1] for n in ours.names] == [theirs.fields[n][1] for n in theirs.names]
    assert beton.ALLOCATION.itemsize == types.ALLOC_TABLE_TYPE.itemsize
    row = types.get_metadata_type([fields.RGBImageField(), fields.IntField()])
    image = row.fields["f0"][0]
    assert beton.ROW.itemsize == row.itemsize
    assert beton.ROW.fields["label"][1] == row.fields["f1"][1]
    assert [beton.ROW.fields[n][1] for n in beton.ROW.names[:4]] == [image.fields[n][1] for n in image.names]


def test_ffcv_reader_sees_what_we_wrote(small_beton):
    reader = pytest.importorskip("ffcv.reader").Reader(str(small_beton.path))
    assert reader.num_samples == 24
    assert reader.field_names == ["image", "label"]
    assert np.array_equal(reader.metadata["f0"]["height"], small_beton.heights)
    assert np.array_equal(reader.metadata["f0"]["data_ptr"], reader.alloc_table["ptr"])
    assert np.array_equal(reader.metadata["f1"], small_beton.labels)
    assert np.array_equal(reader.alloc_table["sample_id"], np.arange(24))
    assert np.array_equal(reader.alloc_table["size"], small_beton.sizes)


@pytest.mark.slow  # numba compiles ffcv's pipeline
@pytest.mark.filterwarnings("ignore")
def test_ffcv_loader_gives_our_pixels(tmp_path, monkeypatch):
    """Raw rows exactly and JPEG rows nearly, with ffcv reading page by page (os_cache=False)."""
    pytest.importorskip("ffcv")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    from rob.common.images.pack import encode_image

    monkeypatch.setattr(beton, "PAGE_BYTES", 1 << 14)  # two images a page
    path = tmp_path / "mixed.beton"
    config = PackConfig("", path)
    with BetonWriter(path, capacity=10) as writer:
        for row in range(10):
            image = raw_image(40, 48, row)
            if row % 2:
                image = encode_image(beton.Image.fromarray(photograph(row, 40, 48)), config)
            writer.append(image, label=row * 3)
        writer.finish(paths=tuple("0123456789"), **DESCRIPTION)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(str(path), 5, num_workers=1, os_cache=False, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    images = np.concatenate([images for images, _ in batches]).astype(int)
    assert np.concatenate([labels for _, labels in batches]).ravel().tolist() == list(range(0, 30, 3))
    for row in range(10):
        difference = np.abs(images[row] - photograph(row, 40, 48)).mean()
        assert difference == 0 if row % 2 == 0 else difference < 3


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_no_image_crosses_a_page(widths):
    """Random image sizes up to eight pages, with pages of 256 bytes."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton, "PAGE_BYTES", 256)
        path = Path(folder) / "data.beton"
        images = [raw_image(1, width, seed) for seed, width in enumerate(widths)]
        write(path, images)
        page = int(np.fromfile(path, beton.HEADER, 1)[0]["page_size"])
        data = Beton(path)
        assert page == max(256, 1 << (3 * max(widths) - 1).bit_length())
        assert (data.pointers // page == (data.pointers + data.sizes - 1) // page).all()
        assert (data.pointers[1:] >= data.pointers[:-1] + data.sizes[:-1]).all()
        for row, image in enumerate(images):
            assert data.encoded(row).tobytes() == image.data


def test_reads_back_shapes_pixels_and_labels(small_beton, image_folder):
    assert small_beton.num_images == len(small_beton.manifest.paths) == 24
    assert small_beton.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for row in (0, 23):
        image = small_beton.image(row)
        assert image.shape == (40 + row, 64 - row, 3) == (small_beton.heights[row], small_beton.widths[row], 3)
        assert np.abs(image.astype(int) - photograph(row, 40 + row, 64 - row)).mean() < 3
        assert image.flags.writeable


def test_file_without_labels_has_none(tmp_path):
    write(tmp_path / "data.beton", [raw_image(4, 5)])
    data = Beton(tmp_path / "data.beton")
    assert data.labels is None
    assert np.array_equal(data.image(0), photograph(0, 4, 5))


def test_pickles_as_its_path(small_beton):
    content = pickle.dumps(small_beton)
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).image(5), small_beton.image(5))


def test_fingerprint_follows_content_not_names(tmp_path):
    write(tmp_path / "a.beton", [raw_image(4, 6, 1), raw_image(4, 6, 2)])
    write(tmp_path / "b.beton", [raw_image(4, 6, 1), raw_image(4, 6, 2)])
    write(tmp_path / "c.beton", [raw_image(4, 6, 2), raw_image(4, 6, 1)])
    turned = StoredImage(raw_image(4, 6, 1).data, 6, 4, beton.RAW)
    write(tmp_path / "d.beton", [turned, raw_image(4, 6, 2)])
    prints = [Beton(tmp_path / f"{name}.beton").manifest.fingerprint for name in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_refuses_missing_file(tmp_path):
    with pytest.raises(MisuseError, match=r"no such file.*rob pack SOURCE"):
        Beton(tmp_path / "data.beton")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not a beton", b"\2\0" + b"x" * 5000])
def test_refuses_other_files(tmp_path, content):
    (tmp_path / "data.beton").write_bytes(content)
    with pytest.raises(MisuseError, match=r"data\.beton: (not a packed data set|a \.beton with other fields)"):
        Beton(tmp_path / "data.beton")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_refuses_truncated_file(small_beton, tmp_path, keep):
    path = copy(small_beton, tmp_path)
    path.write_bytes(path.read_bytes()[: int(keep * small_beton.manifest.size_bytes)])
    with pytest.raises(MisuseError, match="truncated"):
        Beton(path)


def test_refuses_missing_manifest(small_beton, tmp_path):
    path = copy(small_beton, tmp_path)
    manifest_path(path).unlink()
    with pytest.raises(MisuseError, match=r"small\.beton\.json: missing"):
        Beton(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "num_images": '])
def test_refuses_damaged_manifest(small_beton, tmp_path, content):
    path = copy(small_beton, tmp_path)
    manifest_path(path).write_text(content)
    with pytest.raises(MisuseError, match="not a manifest of rob pack"):
        Beton(path)


def test_refuses_manifest_of_another_version(small_beton, tmp_path):
    path = copy(small_beton, tmp_path)
    manifest = manifest_path(path)
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(MisuseError, match="format version 7, this rob reads 1"):
        Beton(path)


def test_refuses_manifest_of_another_file_of_the_same_size(tmp_path):
    write(tmp_path / "a.beton", [raw_image(4, 6, 1)])
    write(tmp_path / "b.beton", [raw_image(4, 6, 2)])
    shutil.copy(tmp_path / "a.beton.json", tmp_path / "b.beton.json")
    with pytest.raises(MisuseError, match="manifest of another file"):
        Beton(tmp_path / "b.beton")


def test_damaged_image_is_named(small_beton, tmp_path):
    path = copy(small_beton, tmp_path)
    with path.open("r+b") as file:
        file.seek(int(small_beton.pointers[3]))
        file.write(bytes(100))
    with pytest.raises(FailureError, match="image 3 is damaged"):
        Beton(path).image(3)


def change_row(path: Path, row: int, **values: int) -> None:
    """Write other values into a row of the file's index, with an allocation that fits, as a forger has it."""
    header = np.memmap(path, beton.HEADER, "r", 0, (1,))[0]
    rows = np.memmap(path, beton.ROW, "r+", beton.ROWS_AT, (row + 1,))
    allocations = np.memmap(path, beton.ALLOCATION, "r+", int(header["allocations_at"]), (row + 1,))
    for name, value in values.items():
        (allocations if name == "size" else rows)[row][name] = value
    allocations[row]["pointer"] = rows[row]["pointer"]
    rows.flush()
    allocations.flush()


@pytest.mark.parametrize(
    ("what", "row", "values"),
    [
        ("size", 2, {"height": 3000, "width": 3000}),  # its pixels would be read from behind the file
        ("place in the file", 2, {"height": 3000, "width": 3000, "size": 3 * 3000 * 3000}),
        ("size", 1, {"height": 11}),
        ("side", 0, {"width": 0}),
        ("place in the file", 2, {"pointer": 1 << 50}),
        ("place in the file", 1, {"pointer": 2**64 - 8}),  # all but round the end
        ("place in the file", 0, {"pointer": 10}),  # the header
        ("mode", 1, {"mode": 7}),
        ("label", 2, {"label": 5}),
    ],
)
def test_a_row_that_cannot_be_is_refused_when_the_file_is_opened(tmp_path, what, row, values):
    write(tmp_path / "a.beton", [raw_image(10, 8 + n, n) for n in range(3)])
    Beton(tmp_path / "a.beton")
    change_row(tmp_path / "a.beton", row, **values)
    with pytest.raises(
        MisuseError, match=rf"a\.beton: damaged: the {what} of image {row} cannot be; pack the data again"
    ):
        Beton(tmp_path / "a.beton")


def test_a_jpeg_that_is_marked_raw_is_refused_and_pixels_marked_jpeg(small_beton, tmp_path):
    path = copy(small_beton, tmp_path)
    change_row(path, 3, mode=beton.RAW)
    with pytest.raises(MisuseError, match="damaged: the size of image 3 cannot be"):
        Beton(path)
    write(tmp_path / "a.beton", [raw_image(10, 8)])
    change_row(tmp_path / "a.beton", 0, mode=beton.JPEG)
    with pytest.raises(FailureError, match=r"a\.beton: image 0 is damaged"):
        Beton(tmp_path / "a.beton").image(0)


def test_nothing_remains_of_a_writer_that_fails(tmp_path):
    with pytest.raises(RuntimeError), BetonWriter(tmp_path / "data.beton", capacity=2) as writer:
        writer.append(raw_image(4, 4))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_second_writer_of_the_same_file_is_refused(tmp_path):
    theirs = tmp_path / ".data.beton.tmp-1"
    with (
        tiny.locked_by_another_process(theirs),
        pytest.raises(MisuseError, match="another rob pack is writing"),
    ):
        BetonWriter(tmp_path / "data.beton", capacity=1)
    assert list(tmp_path.iterdir()) == [theirs]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, error):
    def no_locks(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    (tmp_path / ".data.beton.tmp-1").write_bytes(b"left by a killed pack")
    with BetonWriter(tmp_path / "data.beton", capacity=1) as writer:
        writer.append(raw_image(4, 4))
        writer.finish(paths=("a",), **DESCRIPTION)
    assert Beton(tmp_path / "data.beton").num_images == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.beton", "data.beton.json"]


def test_killed_pack_leaves_nothing_that_looks_finished(image_folder, tmp_path):
    script = """
import sys, time
from pathlib import Path
from rob.common.images.pack import PackConfig, pack

def progress(done, total):
    if done == 10:
        print("ten", flush=True)
        time.sleep(600)

pack(PackConfig(sys.argv[1], Path(sys.argv[2])), progress)
"""
    out = tmp_path / "data.beton"
    process = subprocess.Popen([sys.executable, "-c", script, image_folder, out], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ten\n"
        process.kill()
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [f".data.beton.tmp-{process.pid}"]
    pack(PackConfig(str(image_folder), out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.beton", "data.beton.json"]


def test_labels_have_a_hash_of_their_own(tmp_path):
    """The fingerprint is that of the images: corrected labels are the same images."""
    folder = tiny.tiny_images(tmp_path / "images", 4)
    found = []
    for name, classes in (("a", "0101"), ("b", "0110"), ("none", "")):
        lines = [
            f"{path},{label}" for path, label in zip(sorted(folder.rglob("*.jpg")), classes or "0000", strict=True)
        ]
        listed = tmp_path / f"{name}.csv"
        head = "path,label" if classes else "path"
        listed.write_text("\n".join([head, *(line if classes else line.split(",")[0] for line in lines)]))
        pack(PackConfig(str(listed), tmp_path / f"{name}.beton", shuffle=False, workers=1))
        found.append(Beton(tmp_path / f"{name}.beton"))
    assert len({data.manifest.fingerprint for data in found}) == 1
    assert found[0].labels_hash != found[1].labels_hash
    assert found[2].labels_hash is None
