"""Images of more than 8 bits to 8, by a stated window of values."""

import numpy as np
from PIL import Image

from .config import PackConfig
from .reading import BadImage


def windowed(image: Image.Image, config: PackConfig) -> Image.Image:
    """Grey of 16 or 32 bits or floating point as 8-bit grey, where ``config`` has a window or percentiles; any other as it is.

    BadImage: it has several values, and the window makes one of them.
    """
    if (config.window is None and config.percentiles is None) or not (image.mode == "F" or image.mode.startswith("I")):
        return image
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise BadImage("none of its values is a finite number")
    low, high = config.window or np.percentile(finite, config.percentiles or (0, 100)).tolist()
    high = high if high > low else np.nextafter(low, np.inf)  # most of the image has one value
    levels = np.clip((values - low) / (high - low), 0, 1) * 255
    grey = np.rint(np.nan_to_num(levels, nan=0.0)).astype(np.uint8)
    least, most = finite.min(), finite.max()
    if least < most and grey.min() == grey.max():
        name = "window" if config.window else "percentiles"
        raise BadImage(
            f"its values are from {least:g} to {most:g}, of which the window {low:g} to {high:g} leaves one grey: give another "
            f"`{name}`"
        )
    return Image.fromarray(grey)
