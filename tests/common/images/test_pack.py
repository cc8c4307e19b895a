import hashlib
import io
import resource
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rob.common.errors import FailureError, MisuseError
from rob.common.images import pack as images
from rob.common.images import sources
from rob.common.images.beton import JPEG, RAW, Beton, StoredImage
from rob.common.images.pack import PackConfig, encode_image, pack, shrink, to_rgb
from support.photographs import photograph

PHOTO = photograph(0)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def packed(folder, out, **options) -> Beton:
    """Rows in the source's order, unless ``shuffle`` says otherwise."""
    pack(PackConfig(str(folder), out / "data.beton", **({"shuffle": False} | options)))
    return Beton(out / "data.beton")


def jpeg_bytes(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def encoded(data: bytes | Image.Image, tmp_path, **options) -> StoredImage:
    return encode_image(data, PackConfig("", tmp_path / "unused", **options))


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


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


# --- pixels ---


def test_plain_jpegs_are_kept_byte_for_byte(image_folder, small_beton):
    for row, path in enumerate(small_beton.manifest.paths):
        assert small_beton.encoded(row).tobytes() == (image_folder / path).read_bytes()


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}])
def test_all_usual_kinds_of_jpeg_are_kept(tmp_path, options):
    data = jpeg_bytes(Image.fromarray(PHOTO), **options)
    assert encoded(data, tmp_path).data == data


def rgb_coded(data: bytes) -> bytes:
    """The JPEG with an Adobe marker in place of JFIF's that says its three components are R, G and B."""
    assert data[2:4] == b"\xff\xe0"
    adobe = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, 0)
    return data[:2] + adobe + data[4 + struct.unpack(">H", data[4:6])[0] :]


@pytest.mark.parametrize("variant", ["rgb", "grey", "cmyk", "rotated", "large"])
def test_other_jpegs_are_encoded_anew(tmp_path, variant):
    """What a decoder of YCbCr planes would get wrong, and what has to change."""
    photo = Image.fromarray(PHOTO)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "rgb": lambda: rgb_coded(jpeg_bytes(photo, subsampling="4:4:4")),
        "grey": lambda: jpeg_bytes(photo.convert("L")),
        "cmyk": lambda: jpeg_bytes(photo.convert("CMYK")),
        "rotated": lambda: jpeg_bytes(photo, exif=exif),
        "large": lambda: jpeg_bytes(photo.resize((640, 480))),
    }[variant]()
    stored = encoded(data, tmp_path, max_resolution=100)
    assert stored.data != data
    with Image.open(io.BytesIO(data)) as source, Image.open(io.BytesIO(stored.data)) as result:
        expected = ImageOps.exif_transpose(source).convert("RGB")
        expected.thumbnail((100, 100), Image.Resampling.LANCZOS)
        assert result.mode == "RGB"
        assert "exif" not in result.info
        assert (stored.width, stored.height) == result.size == expected.size
        assert difference(result, expected) < 3


def test_uncommon_chroma_sampling_is_encoded_anew(tmp_path, monkeypatch):
    data = jpeg_bytes(Image.fromarray(PHOTO))
    monkeypatch.setattr(images, "get_sampling", lambda _: -1)
    assert encoded(data, tmp_path).data != data


@pytest.mark.parametrize("frame", [0xC3, 0xC9])
def test_lossless_and_arithmetic_jpegs_are_not_plain(frame):
    data = jpeg_bytes(Image.fromarray(PHOTO))
    with Image.open(io.BytesIO(data)) as image:
        assert images._is_plain_jpeg(data, image)
        assert images._is_plain_jpeg(data[:2] + b"\xff\xff" + data[2:], image)  # fill bytes
        assert not images._is_plain_jpeg(data.replace(b"\xff\xc0", bytes([0xFF, frame]), 1), image)
        assert not images._is_plain_jpeg(data[:2] + b"abc" + data[2:], image)  # stray bytes
        assert not images._is_plain_jpeg(data[:40], image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8] = RED  # top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores the picture so
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        stored.save(buffer, form, exif=exif)
        result = encoded(buffer.getvalue(), tmp_path, raw=True)
        pixels = np.frombuffer(result.data, np.uint8).reshape(result.height, result.width, 3)
        assert pixels.shape == upright.shape, form
        assert difference(pixels, upright) < 4, form


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (255, 127, 127)
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == WHITE
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert to_rgb(palette).getpixel((0, 0)) == RED
    palette.info["transparency"] = 0
    assert [to_rgb(palette).getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 255)]
    palette.info["transparency"] = b"\xff\x00"
    assert [to_rgb(palette).getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]
    keyed = Image.new("RGB", (1, 1), RED)
    keyed.info["transparency"] = RED
    assert to_rgb(keyed).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(tmp_path, form):
    levels = np.arange(0, 65_536, 257, dtype=np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, form)
    result = encoded(buffer.getvalue(), tmp_path, raw=True)
    pixels = np.frombuffer(result.data, np.uint8).reshape(16, 16, 3)
    assert np.array_equal(pixels, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_every_mode_of_16_bit_grey(mode):
    image = Image.new("I", (2, 1), 65_535)
    image.putpixel((1, 0), 32_768)
    if mode != "I":
        image = image.convert(mode)
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [WHITE, (128,) * 3]


def test_other_modes_become_rgb():
    photo = Image.fromarray(PHOTO)
    for mode in ("1", "L", "P", "YCbCr", "HSV", "CMYK", "RGBX"):
        result = to_rgb(photo.convert(mode))
        assert result.mode == "RGB"
        assert difference(result, photo.convert(mode).convert("RGB")) == 0


def test_floating_point_pixels_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("F", (4, 4)).save(tmp_path / "in" / "depth.tiff")
    with pytest.raises(FailureError, match=r"depth\.tiff: floating-point pixels have no known range"):
        packed(tmp_path / "in", tmp_path)


@given(width=st.integers(1, 400), height=st.integers(1, 400), longest=st.integers(1, 300))
def test_shrink_bounds_the_longer_side_and_keeps_the_shape(width, height, longest):
    result = shrink(Image.new("RGB", (width, height)), longest)
    assert max(result.size) == min(longest, max(width, height))
    scale = min(1, longest / max(width, height))
    assert abs(result.width - scale * width) <= 0.5 or result.width == 1
    assert abs(result.height - scale * height) <= 0.5 or result.height == 1


def test_shrink_antialiases():
    checkers = np.indices((256, 256)).sum(axis=0) % 2 * np.uint8(255)
    small = np.asarray(shrink(Image.fromarray(checkers.astype(np.uint8)).convert("RGB"), 32))
    assert np.abs(small.astype(int) - 127).max() <= 12


def test_raw_keeps_pixels_and_jpeg_quality_matters(tmp_path):
    photo = Image.fromarray(PHOTO)
    raw = encoded(photo, tmp_path, raw=True)
    assert (raw.data, raw.mode) == (PHOTO.tobytes(), RAW)
    sizes = [len(encoded(photo, tmp_path, jpeg_quality=quality).data) for quality in (30, 80, 100)]
    assert sizes == sorted(set(sizes))
    assert encoded(photo, tmp_path).mode == JPEG


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
    with pytest.raises(MisuseError, match=r"in: no image in it or below; looked for \.jpg \.jpeg \.png"):
        packed(tmp_path / "in", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"nowhere: no such folder; SOURCE is a folder of images or one of cifar10, "),
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


# --- named data sets ---


def test_fashion_mnist_from_debian(tmp_path):
    if not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    data = packed("fashion-mnist", tmp_path, raw=True, split="test", limit=500)
    assert data.manifest.paths[:2] == ("test/0000", "test/0020")
    assert data.manifest.classes[9] == "Ankle boot"
    assert data.labels[0] == 9
    assert np.bincount(data.labels).min() > 30
    image = data.image(0)
    assert image.shape == (28, 28, 3)
    assert (image[..., 0] == image[..., 2]).all()


class FakeCifar(list):
    """As torchvision's: made with root, train and download; (image, label) by index; class names."""

    classes = ("plane", "ship")

    def __init__(self, root: str, train: bool, download: bool):
        assert download
        super().__init__((Image.fromarray(photograph(row)), row % 2) for row in range(12 if train else 5))


def test_named_data_set_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar)
    data = packed("cifar10", tmp_path, raw=True)
    assert data.manifest.paths == tuple(f"train/{row:02}" for row in range(12))
    assert data.manifest.classes == ("plane", "ship")
    assert data.labels.tolist() == [0, 1] * 6
    assert np.array_equal(data.image(7), photograph(7))
    assert packed("cifar10", tmp_path, split="test").num_images == 5


def test_unknown_split(tmp_path):
    with pytest.raises(MisuseError, match=r"unknown split of cifar10 'tests': did you mean test\?"):
        packed("cifar10", tmp_path, split="tests")


def test_failed_download_is_one_sentence(tmp_path, monkeypatch):
    def offline(**_):
        raise RuntimeError("Error downloading cifar")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(FailureError, match=r"could not download cifar10 to .*cache/rob/cifar10 \(Error downloading"):
        packed("cifar10", tmp_path)


def test_every_named_data_set_exists_in_torchvision():
    from torchvision import datasets

    for class_name, _ in sources.NAMED.values():
        assert hasattr(datasets, class_name)
