"""Class-balanced subsets of labelled images, the same on every machine for a seed."""

import numpy as np
import torch
from torch import Tensor

from ...common.errors import MisuseError
from .features import Features


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
        order = np.random.RandomState([seed, label]).permutation(len(rows))[:count]
        chosen.append(rows[torch.from_numpy(order).to(rows.device)])
    return torch.cat(chosen).sort().values


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
