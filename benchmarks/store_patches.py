"""Targets of patches, as the store has them beside those of views: a part of ``rob bench store``."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rob.common.patches import BASIS, MEAN, fit_pca
from rob.common.store.codec import encode_patches
from rob.common.store.patches import USUAL_DIM, PatchEncoding

SIDE = 14
"""Patches a side of a ViT of 16-pixel patches at 224 pixels, all of which have prototypes."""


class PatchCase(NamedTuple):
    """An encoding of patch targets, and its arrays (N, V, P, ...)."""

    name: str
    encoding: PatchEncoding
    arrays: dict[str, np.ndarray]


def patch_cases(tokens: Tensor, prototypes: int) -> Iterator[PatchCase]:
    """Both kinds of a teacher's ``tokens`` (N, V, C, g, g) float32: the usual grid, and the usual few of so many ``prototypes``.

    A CNN's map has no 14 x 14 tokens: for the latter it is interpolated, and some of its own tokens are the prototypes.
    """
    width, grid = tokens.shape[2:4]
    maps = tokens.flatten(0, 1)
    rows = maps.flatten(2).mT
    pca = fit_pca([rows.flatten(0, 1)], min(USUAL_DIM, width))
    reduced = (rows - torch.from_numpy(pca[MEAN])) @ torch.from_numpy(pca[BASIS]).T
    encoding = PatchEncoding("grid", grid, reduced.shape[2], width)
    yield _case(
        f"patches {grid} x {grid} x {reduced.shape[2]} int8", encoding, tokens, encode_patches(encoding, reduced)
    )

    finer = F.interpolate(reduced.mT.unflatten(2, (grid, grid)), size=(SIDE, SIDE), mode="bilinear").flatten(2).mT
    unit = F.normalize(finer, dim=-1)
    every = unit.flatten(0, 1)
    chosen = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:prototypes]]
    encoding = PatchEncoding("prototypes", SIDE, unit.shape[2], width, len(chosen))
    parts = [encode_patches(encoding, part, part @ chosen.T) for part in unit.split(16)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    yield _case(f"patches {SIDE} x {SIDE}, top {encoding.k} of {len(chosen)}", encoding, tokens, arrays)


def _case(name: str, encoding: PatchEncoding, tokens: Tensor, arrays: dict[str, np.ndarray]) -> PatchCase:
    return PatchCase(
        name, encoding, {n: values.reshape(*tokens.shape[:2], *values.shape[1:]) for n, values in arrays.items()}
    )
