"""Photographs to measure on: those that scikit-learn and scikit-image ship, cut and varied."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

HEIGHT, WIDTH = 375, 500


def make_photographs(folder: Path, count: int) -> None:
    """``count`` JPEGs of WIDTH x HEIGHT at quality 90 into the new ``folder``. scikit-image may be missing."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    try:
        from skimage import data  # pyright: ignore[reportMissingImports]  # only this benchmark needs it

        originals += [Image.fromarray(photo()) for photo in (data.astronaut, data.chelsea, data.coffee, data.rocket)]
    except ImportError:
        pass
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
