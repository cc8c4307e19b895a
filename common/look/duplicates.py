"""Which images are there twice: byte for byte, or alike.

Two images are alike where their hashes differ in few bits and their small grey pictures agree. Not all pairs of hashes are looked
at: two that differ in at most 7 of 64 bits have one of their 8 bytes in common, so the rows that share a byte are compared, some
32 times fewer (multi-index hashing, Norouzi et al., arXiv 1307.2982). Of pairs that differ in more bits most are found.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .config import ALIKE
from .thumbnails import SMALL, Thumbnails

RADIUS = 10
"""Bits of 64 that the hashes of images alike differ by, at most."""
ROWS, COLUMNS = 128, 2048
"""Of the tables of differences: they stay in a core's cache."""
TRIES = 4
"""Rows of such a table that one row's grey picture is compared with, nearest hash first."""
UNLIKE = 64
"""Bits by which hashes differ that are not to be compared."""


@dataclass(frozen=True)
class Duplicates:
    """Row ``rows[k]`` of one set looks like row ``of[k]`` of the other; ``alike`` (K,) is the correlation, 2 where the bytes are
    the same. Each row is there once, in ascending order, with one of the rows that it is like. Within one set ``of`` is the
    earlier row."""

    rows: np.ndarray
    of: np.ndarray
    alike: np.ndarray

    @property
    def exact(self) -> np.ndarray:
        """(K,) bool: the bytes are the same."""
        return self.alike > 1


def duplicates(these: Thumbnails, others: Thumbnails | None = None, least: float = ALIKE) -> Duplicates:
    """The rows of ``these`` that are among ``others``; without them, that are among the rows before them. ``least`` is the
    correlation of grey pictures from which two images are alike.

    Damaged images are like none, and blank ones only where their bytes are the same.
    """
    partner = np.full(len(these.hashes), -1)
    alike = np.zeros(len(partner), np.float32)
    _same_bytes(these, others or these, partner, alike)
    left = _left(these, partner)
    if others is None:
        _alike(these, these, left, left, partner, alike, least, within=True)
    else:
        _alike(these, others, left, _left(others, None), partner, alike, least, within=False)
    rows = np.flatnonzero(partner >= 0)
    return Duplicates(rows, partner[rows], alike[rows])


def _left(those: Thumbnails, partner: np.ndarray | None) -> np.ndarray:
    """(N,) bool: the rows whose looks count, and that have no partner yet."""
    left = np.ones(len(those.hashes), bool) if partner is None else partner < 0
    left[[*those.damaged, *those.blank]] = False
    return left


def _same_bytes(these: Thumbnails, others: Thumbnails, partner: np.ndarray, alike: np.ndarray) -> None:
    whole = np.ones(len(others.digests), bool)
    whole[list(others.damaged)] = False
    ids = np.flatnonzero(whole)
    values, first = np.unique(others.digests[ids], return_index=True)
    place = np.searchsorted(values, these.digests).clip(max=len(values) - 1)
    if not len(values):
        return
    found = values[place] == these.digests
    found[list(these.damaged)] = False
    earliest = ids[first[place]]
    if these is others:
        found &= earliest < np.arange(len(found))
    partner[found], alike[found] = earliest[found], 2


def _alike(
    these: Thumbnails, others: Thumbnails, left: np.ndarray, candidates: np.ndarray,
    partner: np.ndarray, alike: np.ndarray, least: float, *, within: bool,
) -> None:  # fmt: skip
    """Give partners to the rows ``left``. A row that has one is compared no more: of thousands of pictures alike each is looked
    at a few times."""
    for rows, columns in _sharing_a_byte(these.hashes, others.hashes, np.flatnonzero(left), np.flatnonzero(candidates)):
        rows = rows[partner[rows] < 0]
        different = np.bitwise_count(these.hashes[rows, None] ^ others.hashes[columns])
        if within:
            different[columns >= rows[:, None]] = UNLIKE
        open_rows = np.flatnonzero((different <= RADIUS).any(1))
        for _ in range(TRIES):
            if not len(open_rows):
                break
            nearest = different[open_rows].argmin(1)
            row, column = rows[open_rows], columns[nearest]
            agreement = correlation(these.grey[row], others.grey[column])
            found = agreement >= least
            partner[row[found]], alike[row[found]] = column[found], agreement[found]
            different[open_rows[~found], nearest[~found]] = UNLIKE
            open_rows = open_rows[~found]
            open_rows = open_rows[(different[open_rows] <= RADIUS).any(1)]


def _sharing_a_byte(
    these: np.ndarray, others: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of rows and columns whose hashes have a byte in common, for each of the eight bytes."""
    for byte in range(8):
        grouped = [_by_byte(hashes, ids, byte) for hashes, ids in ((these, rows), (others, columns))]
        for one, other in zip(*grouped, strict=True):
            for i in range(0, len(one), ROWS):
                for j in range(0, len(other), COLUMNS):
                    yield one[i : i + ROWS], other[j : j + COLUMNS]


def _by_byte(hashes: np.ndarray, ids: np.ndarray, byte: int) -> list[np.ndarray]:
    """The ids for each of the 256 values of a byte, ascending."""
    values = hashes[ids].view(np.uint8).reshape(len(ids), 8)[:, byte]
    order = np.argsort(values, kind="stable")
    return np.split(ids[order], np.searchsorted(values[order], np.arange(1, 256)))


def correlation(these: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of pairs of grey pictures (N, 16, 16), (N,) float32 within [-1, 1]; whatever their brightness and contrast. 0 for one of a
    single colour."""
    one, other = (grey.reshape(len(grey), SMALL * SMALL).astype(np.float32) for grey in (these, others))
    one, other = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.einsum("np,np->n", one, other) / np.maximum(norms, 1e-6)
