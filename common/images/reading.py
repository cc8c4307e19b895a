"""A file's bytes to the picture that a viewer shows: upright, 8-bit RGB. Whoever reads images reads them here.

Only formats that Pillow decodes itself are tried (EPS would start Ghostscript), and a limit of pixels is held to before anything
is decoded. What is wrong in metadata alone does not matter.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .dicom import count_frames, is_dicom, open_frame
from .window import windowed

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".pbm", ".pgm", ".ppm", ".pnm"),
    *(".tif", ".tiff", ".webp", ".avif", ".jp2", ".j2k", ".tga", ".qoi"),
)
"""Files of a folder with one of these endings (in either case) are its images."""
HEIF = (".heic", ".heif")
"""Where the package pillow-heif is installed."""
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "TGA", "QOI")
"""Pillow's names of what is tried, whatever a file is called."""
DICOM = (".dcm", ".dicom")
"""Where the package pydicom is installed."""
PAGED = (".tif", ".tiff", *DICOM)
"""Those that may hold several pictures, each worth an image."""
MOST_PIXELS = 1 << 28
"""Of an image, decoded: 268 million, 0.8 GB."""
DRAFT_PIXELS = 1 << 26
"""JPEGs of more pixels are decoded at a half, a quarter or an eighth of their size where a smaller one is wanted."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation."""

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns in the terminal; `open_image` holds to another


class BadImage(Exception):
    """An image that cannot be read; the message says why, without the path."""


@cache
def endings() -> tuple[str, ...]:
    """``EXTENSIONS``, and those of what is installed beside Pillow."""
    return (*EXTENSIONS, *(HEIF if _has_heif() else ()), *(DICOM if _has_dicom() else ()))


@cache
def _has_heif() -> bool:
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@cache
def _has_dicom() -> bool:
    return find_spec("pydicom") is not None


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    known = (*FORMATS, "HEIF") if _has_heif() else FORMATS
    return tuple(name for name in known if name in Image.OPEN)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings of Pillow's, which are about metadata, reach the terminal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\.")
        yield


def open_image(data: bytes, longest: int | None = None, page: int = 0) -> Image.Image:
    """A file's image, or its ``page``, decoded. ``longest``: its longer side will be made so small, so that a huge JPEG need not
    be decoded whole.

    BadImage: the file is empty, broken, of another kind, or has more pixels than ``MOST_PIXELS``.
    """
    with _pillows_errors(data):
        if is_dicom(data) and _has_dicom():
            return open_frame(data, MOST_PIXELS, page)
        image = Image.open(io.BytesIO(data), formats=_formats())
        if page:
            image.seek(page)
        if longest and image.width * image.height > DRAFT_PIXELS:
            image.draft(
                "RGB", (2 * longest * image.width // max(image.size), 2 * longest * image.height // max(image.size))
            )
        if image.width * image.height > MOST_PIXELS:
            raise BadImage(
                f"{image.width} x {image.height} pixels, at most {MOST_PIXELS // 10**6} million are decoded: make it smaller"
                + ("" if longest else ", or if it is a JPEG, use `max_resolution`")
            )
        image.load()
        return image


def count_pages(data: bytes) -> int:
    """Pictures that a file of ``PAGED`` holds. BadImage: it is broken."""
    with _pillows_errors(data):
        if is_dicom(data) and _has_dicom():
            return count_frames(data)
        return getattr(Image.open(io.BytesIO(data), formats=_formats()), "n_frames", 1)


@contextmanager
def _pillows_errors(data: bytes) -> Iterator[None]:
    """As BadImage."""
    if not data:
        raise BadImage("the file is empty")
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise about every kind on broken files
        raise BadImage(str(error) or type(error).__name__) from error


def upright(image: Image.Image) -> Image.Image:
    """The image as EXIF's orientation says it is to be seen; itself where it says nothing, or nothing that can be read."""
    with suppress(Exception):  # Pillow raises about every kind on broken metadata
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # after load: some formats put it at the end
        if orientation in UPRIGHT:
            return image.transpose(UPRIGHT[orientation])
    return image


def read_pixels(data: bytes) -> Image.Image:
    """A file's image as a viewer shows it, in 8-bit RGB. BadImage: it cannot be read."""
    image = open_image(data)
    try:
        return to_rgb(upright(image))
    except (ValueError, OSError) as error:
        raise BadImage(str(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB. Raises ValueError for floating-point pixels whose range is unknown."""
    image = windowed(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; state one with `window` or `percentiles`")
    if image.mode.startswith("I"):  # 16-bit grey; "I" is the 32-bit form that some readers put it in
        levels = np.asarray(image).astype(np.int64).clip(0, 65_535)
        return Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:  # hidden colours under transparent pixels are arbitrary, often black
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
