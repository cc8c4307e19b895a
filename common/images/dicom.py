"""DICOM, by pydicom: a frame's values as their modality has them (a CT's Hounsfield units), with the window that it brings."""

import io
from typing import Any

import numpy as np
from PIL import Image

from .window import INVERTED, OWN

MAGIC_AT, MAGIC = 128, b"DICM"


def is_dicom(data: bytes) -> bool:
    return data[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def count_frames(data: bytes) -> int:
    return int(_dataset(data, pixels=False).get("NumberOfFrames") or 1)


def open_frame(data: bytes, most_pixels: int, frame: int = 0) -> Image.Image:
    """A picture of floats, whose ``info`` has the window to see them by, or one of colours. Raises whatever pydicom raises, and
    ValueError: it holds no picture, or one of more than ``most_pixels``.

    Without a window of its own a frame is seen from its least to its greatest value.
    """
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    dataset = _dataset(data)
    if "PixelData" not in dataset:
        raise ValueError("a DICOM file without a picture")
    if int(dataset.Rows) * int(dataset.Columns) > most_pixels:
        raise ValueError(
            f"{dataset.Columns} x {dataset.Rows} pixels, at most {most_pixels // 10**6} million are decoded"
        )
    several = int(dataset.get("NumberOfFrames") or 1) > 1
    values = pixel_array(dataset, index=frame) if several else pixel_array(dataset)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
    if values.ndim == 3:
        return Image.fromarray((values >> 8 if values.dtype.itemsize == 2 else values).astype(np.uint8))
    values = np.asarray(apply_modality_lut(values, dataset), np.float32)
    window = _window(dataset)
    if window is None and "VOILUTSequence" in dataset:
        values = np.asarray(apply_voi_lut(values.astype(np.int64), dataset), np.float32)
    image = Image.fromarray(values)
    image.info |= {OWN: window or (float(values.min()), float(values.max())), INVERTED: kind == "MONOCHROME1"}
    return image


def _window(dataset: Any) -> tuple[float, float] | None:
    """The first of the file's, by its linear function (PS3.3, C.11.2.1.2)."""
    centre, width = (np.atleast_1d(dataset.get(f"Window{name}") or ()) for name in ("Center", "Width"))
    if not centre.size or not width.size:
        return None
    middle, span = float(centre[0]), float(width[0])
    if dataset.get("VOILUTFunction") == "LINEAR_EXACT" or span <= 1:
        return middle - span / 2, middle + span / 2
    return middle - 0.5 - (span - 1) / 2, middle - 0.5 + (span - 1) / 2


def _dataset(data: bytes, pixels: bool = True) -> Any:
    from pydicom import dcmread

    return dcmread(io.BytesIO(data), stop_before_pixels=not pixels)
