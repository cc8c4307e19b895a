"""A sheet of the pairs of images that ``rob check`` found alike, the least alike first: are they the same?"""

from pathlib import Path

import numpy as np

from ..errors import shortened
from ..files import replacing
from ..images.beton import Beton
from .duplicates import Duplicates
from .sheet import FAINT, GAP, LINE, PAGE, TILE, Sheet

MOST = 60
"""Pairs on a sheet."""
SIDE_BY_SIDE = 5
LETTERS = 27
"""Of a path below its pair."""


def pairs_sheet(out: Path, found: list[tuple[Beton, Beton, Duplicates]]) -> int:
    """Draw to the PNG ``out`` at most 60 of the pairs that are not the same bytes, spread over how alike they are. Returns how
    many there are to choose from; 0: nothing is drawn."""
    pairs = [
        (alike, these, row, others, of)
        for these, others, pairs in found
        for row, of, alike in zip(pairs.rows.tolist(), pairs.of.tolist(), pairs.alike.tolist(), strict=True)
        if alike <= 1
    ]
    if not pairs:
        return 0
    pairs.sort(key=lambda pair: pair[0])
    shown = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(MOST, len(pairs))).round().astype(int)]
    width, height = PAGE / SIDE_BY_SIDE, TILE + 3 * LINE + 0.12
    sheet = Sheet(
        PAGE, height * -(-len(shown) // SIDE_BY_SIDE),
        f"{len(shown)} of {len(pairs):,} pairs of images alike",
        "The least alike first. Below each pair: how alike (1: the same but for size, quality, brightness), and the two paths.",
    )  # fmt: skip
    for number, (alike, these, row, others, of) in enumerate(shown):
        left, top = width * (number % SIDE_BY_SIDE), height * (number // SIDE_BY_SIDE)
        for place, data, image_id in ((0, these, row), (1, others, of)):
            sheet.tile(left + place * (TILE + GAP), top, TILE, data.image(image_id))
            path = shortened(data.manifest.paths[image_id], LETTERS, tail=True)
            sheet.text(left, top + TILE + (1 + place) * LINE, path, FAINT)
        sheet.text(left, top + TILE, f"{alike:.3f}")
    with replacing(out) as file:
        sheet.figure.savefig(file, format="png", metadata={"Software": None})
    return len(pairs)
