"""Class-balanced subsets of labelled images, the same on every machine for a seed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...common.errors import MisuseError
from ...common.files import read_regular
from .features import Features

LARGEST = 1 << 30
"""Bytes of a list of images."""


def balanced_subset(
    labels: Tensor, *, fraction: float | None = None, per_class: int | None = None, seed: int = 0
) -> Tensor:
    """Row numbers, ascending, of ``per_class`` images of every class, or of ``fraction`` of each (at least one).

    The images of class c are put in the order ``np.random.RandomState([seed, c]).permutation(count)``, a stream that
    NumPy has frozen, and the first are taken. So 1 % is a part of 10 %, and other classes play no part.

    MisuseError: a class with fewer than ``per_class`` images, a fraction outside (0, 1], or not exactly one of the two.
    """
    if (fraction is None) == (per_class is None):
        raise MisuseError("a subset is given by a fraction or by a number of images of each class, one of the two")
    if fraction is not None and not 0 < fraction <= 1:
        raise MisuseError(f"a fraction of {fraction:g} of the training set: choose one above 0, up to 1")
    if per_class is not None and per_class < 1:
        raise MisuseError(f"{per_class} images of each class: choose at least 1")
    chosen = []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        count = per_class or max(1, round((fraction or 0) * len(rows)))
        if count > len(rows):
            raise MisuseError(f"{count} images of each class are wanted and class {label} has {len(rows)}")
        of_seed = [seed] if seed < 1 << 32 else [seed & 0xFFFFFFFF, seed >> 32]  # which takes 32 bits
        order = np.random.RandomState([*of_seed, label]).permutation(len(rows))[:count]
        chosen.append(rows[torch.from_numpy(order).to(rows.device)])
    return torch.cat(chosen).sort().values


def listed_rows(file: Path, paths: Sequence[str]) -> Tensor:
    """Image ids, ascending, of the images that ``file`` names, one a line: file names, or paths as ``paths`` end in them.

    So are the published lists of 1 % and 10 % of ImageNet, and MSN's. MisuseError: no such file, none in it, or names that
    are not those of exactly one image.
    """
    try:
        names = [name for line in read_regular(file, LARGEST).decode().splitlines() if (name := line.strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(
            f"`subset` {file} cannot be read ({error}): give a text file of image names, one a line"
        ) from None
    if not names:
        raise MisuseError(f"`subset` {file} names no image: give a text file of image names, one a line")
    by_name: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        by_name.setdefault(path.rpartition("/")[2], []).append(row)
    found, wrong = set(), []
    for name in names:
        rows = [row for row in by_name.get(name.rpartition("/")[2], ()) if f"/{paths[row]}".endswith(f"/{name}")]
        found.update(rows)
        if len(rows) != 1:
            wrong.append(name)
    if wrong:
        shown = ", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
        raise MisuseError(
            f"`subset` {file}: {len(wrong)} of {len(names)} names are not those of exactly one image of the data ({shown}): "
            "pack all that it names, or give longer paths where several are called the same"
        )
    return torch.tensor(sorted(found))


def hold_out(data: Features, fraction: float, seed: int, remedy: str) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, ascending: ``balanced_subset``'s ``fraction`` of each class are held out.

    MisuseError, which ends in ``remedy``: a class of which nothing would be left to train on.
    """
    held_out = balanced_subset(data.labels, fraction=fraction, seed=seed)
    kept = torch.ones(len(data), dtype=torch.bool, device=data.labels.device)
    kept[held_out] = False
    rows = kept.nonzero().flatten()
    labels = data.labels[held_out]
    lone = labels[~torch.isin(labels, data.labels[rows])]
    if len(lone):
        name = data.class_name(int(lone[0]))
        raise MisuseError(f"class {name} has one image, none is left to train on: {remedy}")
    return rows, held_out
