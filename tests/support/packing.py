"""Packing for tests, and a photograph."""

import io

from PIL import Image

from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from support.photographs import photograph

PHOTO = photograph(0)


def packed(folder, out, **options) -> Beton:
    """Rows in the source's order, unless ``shuffle`` says otherwise."""
    pack(PackConfig(str(folder), out / "data.beton", **({"shuffle": False} | options)))
    return Beton(out / "data.beton")


def jpeg_bytes(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()
