"""What ``rob pack`` makes of an image of any kind: the pixels and the bytes that are stored."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rob.common.errors import FailureError
from rob.common.images import pack as images
from rob.common.images.beton import JPEG, RAW, StoredImage
from rob.common.images.pack import PackConfig, encode_image, shrink
from rob.common.images.reading import to_rgb
from support.packing import PHOTO, jpeg_bytes, packed

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(data: bytes | Image.Image, tmp_path, **options) -> StoredImage:
    return encode_image(data, PackConfig("", tmp_path / "unused", **options))


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


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


def test_exif_orientation_of_a_deep_image_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.arange(24 * 40, dtype=np.uint16).reshape(24, 40)).save(buffer, "PNG", exif=exif)
    for window in (None, (0.0, 960.0)):
        result = encoded(buffer.getvalue(), tmp_path, raw=True, window=window)
        assert (result.height, result.width) == (40, 24)


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
