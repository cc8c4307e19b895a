"""Photographs to measure on: those that scikit-learn and scikit-image ship, cut and varied; without both, drawn pictures."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

HEIGHT, WIDTH = 375, 500
DRAWN = 4
"""Pictures that are drawn where there are no photographs."""


def make_photographs(folder: Path, count: int) -> str:
    """``count`` JPEGs of WIDTH x HEIGHT at quality 90 into the new ``folder``. Says what they were cut out of."""
    originals, source = _originals()
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        original = originals[i % len(originals)]
        width = int(original.width * random.uniform(0.6, 1))
        height = min(original.height, width * HEIGHT // WIDTH)
        left = int(random.integers(0, original.width - width + 1))
        top = int(random.integers(0, original.height - height + 1))
        cut = original.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        cut = ImageEnhance.Brightness(cut).enhance(random.uniform(0.7, 1.2))
        cut.save(folder / f"{i:05}.jpg", quality=90)
    return source


def _originals() -> tuple[list[Image.Image], str]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return [_drawn(seed) for seed in range(DRAWN)], "drawn pictures"
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    try:
        from skimage import data  # pyright: ignore[reportMissingImports]  # in no extra
    except ImportError:
        return originals, "photographs of scikit-learn"
    originals += [Image.fromarray(photo()) for photo in (data.astronaut, data.chelsea, data.coffee, data.rocket)]
    return originals, "photographs of scikit-learn and scikit-image"


def _drawn(seed: int) -> Image.Image:
    """640 x 427 of noise whose amplitude falls with its frequency, as a photograph's does: its JPEG is about as large."""
    height, width = 427, 640
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = np.maximum(np.hypot(rows, columns), 1 / width) ** -1.3
    noise = np.random.default_rng(seed).standard_normal((3, height, width))
    grey = np.fft.irfft2(np.fft.rfft2(noise) * falling, s=(height, width))
    colours = grey[:1] + 0.3 * grey[1:].mean(0) + 0.3 * grey  # channels that have most in common
    scaled = (colours - colours.mean()) / colours.std() * 55 + 120
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
