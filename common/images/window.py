"""Images of more than 8 bits to 8, by a stated window of values."""

import numpy as np
from PIL import Image

Window = tuple[float, float]
OWN, INVERTED = "window", "inverted"
"""What a picture's ``info`` says of its values: the window to see them by, and whether the highest is black."""


def is_deep(image: Image.Image) -> bool:
    """Grey of 16 or 32 bits, or of floating point."""
    return image.mode == "F" or image.mode.startswith("I")


def windowed(image: Image.Image, window: Window | None = None, percentiles: Window | None = None) -> Image.Image:
    """A deep image as 8-bit grey: ``window`` becomes black to white, or else these percentiles of its own values, or else the
    window that it brings; any other image, and where there is no window, as it is.

    ValueError: it has several values, and the window makes one of them.
    """
    if not is_deep(image) or not (window or percentiles or OWN in image.info):
        return image
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its values is a finite number")
    low, high = window or (np.percentile(finite, percentiles).tolist() if percentiles else image.info[OWN])
    high = high if high > low else np.nextafter(low, np.inf)  # most of the image has one value
    levels = np.clip((values - low) / (high - low), 0, 1) * 255
    levels = 255 - levels if image.info.get(INVERTED) else levels
    grey = np.rint(np.nan_to_num(levels, nan=0.0)).astype(np.uint8)
    least, most = finite.min(), finite.max()
    if least < most and grey.min() == grey.max():
        name = "window" if window or not percentiles else "percentiles"
        raise ValueError(
            f"its values are from {least:g} to {most:g}, of which the window {low:g} to {high:g} leaves one grey: give another "
            f"`{name}`"
        )
    return Image.fromarray(grey)
