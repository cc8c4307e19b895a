"""Files as people have them, and as somebody might make them: wrong metadata, huge pictures, pipes, odd names."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rob.common.errors import FailureError, MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, encode_image, pack
from rob.common.images.reading import BadImage, quiet_pillow, read_pixels
from rob.common.images.sources import open_folder, open_source
from support.packing import jpeg_bytes, packed
from support.photographs import photograph

CONFIG = PackConfig("", Path("a.beton"))
PHOTO = Image.fromarray(photograph(1, 40, 60))


def with_exif(block: bytes) -> bytes:
    """A JPEG with this APP1 segment."""
    plain = jpeg_bytes(PHOTO)
    body = b"Exif\0\0" + block
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]


def tiff(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A big-endian directory of (tag, type, count, 4 bytes)."""
    entries = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in tags)
    return b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", len(tags)) + entries + bytes(4)


ORIENTATION_6 = (0x0112, 3, 1, b"\0\6\0\0")
BESIDE = {
    "signed -1": (0x0128, 9, 1, b"\xff\xff\xff\xff"),
    "float for a short": (0x0128, 11, 1, struct.pack(">f", 2.5)),
    "ascii for a short": (0x0128, 2, 4, b"two\0"),
    "negative offset": (0x011A, 5, 1, b"\xff\xff\xff\xf0"),
}


@pytest.mark.parametrize("block", [bytes(64), b"", b"MM\0*", os.urandom(50)], ids=["zeros", "empty", "cut", "noise"])
def test_broken_exif_does_not_break_a_good_picture(block):
    stored = encode_image(with_exif(block), CONFIG)
    assert (stored.height, stored.width) == (40, 60)


@pytest.mark.parametrize("beside", BESIDE)
def test_an_orientation_beside_a_bad_tag_is_heeded(beside):
    tags = sorted([ORIENTATION_6, BESIDE[beside]])
    with quiet_pillow():  # as pack does
        stored = encode_image(with_exif(tiff(*tags)), CONFIG)
    assert (stored.height, stored.width) == (60, 40)


def png_of(width: int, height: int) -> bytes:
    """A grey PNG of so many zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezer = zlib.compressobj(1)
    rows = b"".join(squeezer.compress(bytes(1 + width)) for _ in range(min(height, 2))) + squeezer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_named_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    with pytest.raises(FailureError, match=r"bomb\.png: 60000 x 60000 pixels, at most 268 million are decoded"):
        packed(tmp_path, tmp_path)


def test_a_huge_jpeg_packs_smaller(tmp_path):
    """144 megapixels: Pillow warned of them, and refused twice as many."""
    source = tmp_path / "images"
    source.mkdir()
    Image.new("L", (16_000, 9_000), 77).save(source / "large.jpg", quality=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = packed(source, tmp_path, max_resolution=64)
    assert data.image(0).shape == (36, 64, 3)
    assert abs(int(data.image(0).mean()) - 77) <= 1


def test_pillows_warnings_do_not_reach_the_terminal(tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.info["transparency"] = bytes(range(64))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.jpg").write_bytes(with_exif(os.urandom(50)))
    script = "import sys; from rob.cli import main; sys.argv = ['rob', *sys.argv[1:]]; main()"
    words = [sys.executable, "-c", script, "pack", str(tmp_path / "images"), str(tmp_path / "a.beton")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_pipe_and_a_device_are_named_and_not_read(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    PHOTO.save(folder / "z.png")
    for make in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        make(folder / "a.png")
        with pytest.raises(FailureError, match=r"broken image .*a\.png: not a regular file"):
            packed(folder, tmp_path)
        assert packed(folder, tmp_path, skip_bad=True).num_images == 1
        (folder / "a.png").unlink()


def test_a_file_that_would_start_a_program_is_no_image(tmp_path):
    """PostScript goes to Ghostscript in Pillow, whatever its name."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(FailureError, match=r"a\.png: not an image that Pillow can read"):
        packed(tmp_path, tmp_path)


def test_every_ending_of_a_picture_is_read(tmp_path):
    folder, said = tmp_path / "images", []
    folder.mkdir()
    for ending in ("jfif", "jpe", "JPG", "jp2", "png", "tga", "dib", "pbm"):
        kind = {"jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "pbm": "PPM", "jp2": "JPEG2000"}.get(
            ending, ending.upper()
        )
        image = PHOTO.convert("1") if ending == "pbm" else PHOTO
        image.save(folder / f"a.{ending}", kind)
    for name in ("notes.txt", "more.txt", "film.mp4", "README", ".hidden"):
        (folder / name).write_text("...")
    pack(PackConfig(str(folder), tmp_path / "a.beton"), note=said.append)
    assert Beton(tmp_path / "a.beton").num_images == 8
    assert said == [
        f"left out of {folder}, as no images by their names: 2 .txt, 1 .mp4, 1 without an ending"
    ] or said == [f"left out of {folder}, as no images by their names: 2 .txt, 1 without an ending, 1 .mp4"]


def test_what_a_machine_left_and_one_stray_picture_cost_no_labels(tmp_path):
    for path in (
        "cat/1.png",
        "cat/2.png",
        "dog/1.png",
        "cat/@eaDir/1.png",
        "@eaDir/x/y.png",
        "__MACOSX/cat/1.png",
        "me.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(tmp_path / path)
    source = open_folder(tmp_path)
    assert source.paths == ("cat/1.png", "cat/2.png", "dog/1.png")
    assert source.classes == ("cat", "dog")
    assert source.left_out == (f"left out me.png: beside the folders of classes in {tmp_path}",)


def test_many_pictures_beside_folders_are_pictures_without_classes(tmp_path):
    for path in ("a/1.png", "b/1.png", "1.png", "2.png", "3.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(tmp_path / path)
    assert open_folder(tmp_path).classes is None
    assert len(open_folder(tmp_path).paths) == 5


def test_an_empty_source_is_not_the_folder_one_is_in():
    with pytest.raises(MisuseError, match="SOURCE is empty"):
        open_source(CONFIG)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((4, 4), 20_000, np.uint16)), (78, 78, 78)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
    ],
    ids=["16-bit grey", "transparent"],
)
def test_pixels_are_read_in_one_way(image, expected):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert read_pixels(buffer.getvalue()).getpixel((0, 0)) == expected


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", jpeg_bytes(PHOTO)[:300], b"GIF89a" + bytes(20)])
def test_what_cannot_be_read_says_why(content):
    with pytest.raises(BadImage, match=r"^[^\n]+$"):
        read_pixels(content)


def test_a_name_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("\x1b[31mred\x1b[0m.jpg", "new\nline.jpg", "\u202egpj.jpg"):
        (tmp_path / "images" / name).write_bytes(b"broken")
    PHOTO.save(tmp_path / "images" / "whole.jpg")
    script = "import sys; from rob.cli import main; sys.argv = ['rob', *sys.argv[1:]]; main()"
    for more, code, errors, skipped in (((), 1, 1, 0), (("--skip-bad",), 0, 0, 3)):
        words = [sys.executable, "-c", script, "pack", str(tmp_path / "images"), str(tmp_path / "a.beton"), *more]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, errors)
        assert sum(line.startswith("skipped ") for line in done.stdout.splitlines()) == skipped
        assert "line.jpg: broken" not in done.stdout.splitlines()
        assert not set("\x1b\u202e") & set(done.stderr + done.stdout)


def test_names_that_are_no_utf8_are_drawn(tmp_path):
    from rob.common.look.config import SheetConfig
    from rob.common.look.contact_sheet import contact_sheet

    folder = tmp_path / "images"
    for kind in (b"caf\xe9", b"\xff\xfe"):
        os.makedirs(os.fsencode(folder) + b"/" + kind)
        for row in range(2):
            with open(os.fsencode(folder) + b"/" + kind + b"/\xe9%d.png" % row, "wb") as file:
                PHOTO.save(file, "PNG")
    data = packed(folder, tmp_path)
    contact_sheet(SheetConfig(data=data.path, out=tmp_path / "sheet.png", images=2))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 100
