"""Images as a ``.beton`` stores them, and their planes. Importing this needs ffcv."""

import io

import numpy as np
from PIL import Image

from rob.common.views import decode
from rob.common.views import planes as layouts

SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def jpeg(pixels: np.ndarray, **options) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 90, **options})
    return np.frombuffer(buffer.getvalue(), np.uint8)


def decoded(stored: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored.tobytes())).convert("RGB"))


def planes_of(stored: np.ndarray, mode: int, height: int, width: int, scale: int = 1):
    heights, widths, scales = np.array([height], np.int32), np.array([width], np.int32), np.array([scale])
    starts = decode.plane_starts(heights, widths, scales)
    planes = np.full(starts[-1], 255, np.uint8)
    layout = np.full((1, layouts.LAYOUT_COLUMNS), -1, np.int32)
    decode.decode_planes(
        decode.decoder_handle(), stored, np.zeros(1, np.uint64), np.array([stored.size], np.uint64),
        np.array([mode], np.uint8), heights, widths, np.zeros(1, np.int64), scales, starts, planes, layout,
    )  # fmt: skip
    return planes, starts, layout
