"""What a packed image looks like in 272 bytes: a small grey picture of it, and 64 bits that pictures alike have in common.

The bits are a perceptual hash (pHash): which of the lowest 8 x 8 frequencies of a grey picture's cosine transform are above their
median. They survive another size, quality, brightness or contrast; of two unlike pictures about half differ.
"""

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from ..cores import usable_cores
from ..errors import FailureError
from ..images.beton import RAW, Beton

SIDE = 32
"""Pixels of the grey picture that is hashed."""
SMALL = 16
"""Pixels of the one that is kept."""
BITS = 8
"""Frequencies a side of which the hash is made."""
CHUNK = 256
"""Images that a thread takes at a time."""
BLANK = 8
"""Levels of 256 that the pixels of a blank image differ by, at most, in each of its colours."""


@dataclass(frozen=True)
class Thumbnails:
    """Row i is of image i of ``data``; 0 in the rows of ``damaged``.

    digests   (N,) uint64, of the stored bytes: equal where these are
    hashes    (N,) uint64, the perceptual hash
    grey      (N, 16, 16) uint8
    damaged   ids of images whose checksum is wrong, or that cannot be decoded
    blank     ids of images that are of one colour
    """

    data: Beton
    digests: np.ndarray
    hashes: np.ndarray
    grey: np.ndarray
    damaged: tuple[int, ...]
    blank: tuple[int, ...]


def thumbnails(data: Beton, workers: int = 0, progress: Callable[[int, int], None] | None = None) -> Thumbnails:
    """Look at every image once, on ``workers`` threads (0: one a core): Pillow decodes outside the GIL, a JPEG's grey alone and
    no larger than is needed. ``progress`` gets (images looked at, all images)."""
    starts = iter(range(0, data.num_images, CHUNK))
    threads = workers or usable_cores()
    parts: list[Thumbnails] = []
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(_chunk, data, start) for start in islice(starts, 2 * threads)]
        while running:
            parts.append(running.pop(0).result())
            running += [pool.submit(_chunk, data, start) for start in islice(starts, 1)]
            if progress:
                progress(min(len(parts) * CHUNK, data.num_images), data.num_images)
    return Thumbnails(
        data,
        digests=np.concatenate([part.digests for part in parts]),
        hashes=np.concatenate([part.hashes for part in parts]),
        grey=np.concatenate([part.grey for part in parts]),
        damaged=tuple(i for part in parts for i in part.damaged),
        blank=tuple(i for part in parts for i in part.blank),
    )


def _chunk(data: Beton, start: int) -> Thumbnails:
    image_ids = range(start, min(start + CHUNK, data.num_images))
    digests = np.zeros(len(image_ids), np.uint64)
    pictures = np.zeros((len(image_ids), SIDE, SIDE), np.float32)
    damaged, blank = [], []
    for row, image_id in enumerate(image_ids):
        try:
            digests[row] = _digest(data, image_id)
            grey = _grey(data, image_id)
            pictures[row] = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
            if np.ptp(pictures[row]) <= BLANK and _is_blank(data, image_id):
                blank.append(image_id)
        except (FailureError, OSError, ValueError, SyntaxError):  # Pillow's decoders raise the last three
            digests[row], pictures[row] = 0, 0
            damaged.append(image_id)
    step = SIDE // SMALL
    small = pictures.reshape(len(pictures), SMALL, step, SMALL, step).mean((2, 4)).round().astype(np.uint8)
    return Thumbnails(data, digests, perceptual_hashes(pictures), small, tuple(damaged), tuple(blank))


def _digest(data: Beton, image_id: int) -> np.uint64:
    if not data.is_whole(image_id):
        raise FailureError("its checksum is wrong")
    shape = f"{data.modes[image_id]} {data.widths[image_id]} {data.heights[image_id]} ".encode()
    digest = hashlib.blake2b(shape, digest_size=8)
    digest.update(data.encoded(image_id).data)
    return np.frombuffer(digest.digest(), np.uint64)[0]


def _grey(data: Beton, image_id: int) -> Image.Image:
    """The image in grey; a large JPEG at a half, a quarter or an eighth, which costs less than decoding it."""
    if data.modes[image_id] == RAW:
        return data.picture(image_id).convert("L")
    with Image.open(io.BytesIO(data.encoded(image_id).tobytes()), formats=("JPEG", "MPO")) as image:
        image.draft("L", (2 * SIDE, 2 * SIDE))
        image.load()
        return image.convert("L")


def _is_blank(data: Beton, image_id: int) -> bool:
    """Whether the whole image is of one colour, of which its thumbnail says no more than that it may be."""
    return all(high - low <= BLANK for low, high in data.picture(image_id).getextrema())  # type: ignore[misc]


def perceptual_hashes(pictures: np.ndarray) -> np.ndarray:
    """(N, 32, 32) of any real type to (N,) uint64."""
    frequency, pixel = np.arange(BITS)[:, None], np.arange(SIDE)
    cosines = np.cos(np.pi / SIDE * (pixel + 0.5) * frequency).astype(np.float32)
    lowest = (cosines @ pictures.astype(np.float32) @ cosines.T).reshape(len(pictures), BITS * BITS)
    above = lowest > np.median(lowest[:, 1:], axis=1, keepdims=True)
    return np.packbits(above, axis=1).view(np.uint64)[:, 0]
