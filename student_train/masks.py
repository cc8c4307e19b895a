"""Which patches iBOT hides from the student (2111.07832, after BEiT): blocks, up to a share of the view that is drawn for it.

A share is 0 or, as often, uniform from .1 to .5. Blocks have an area of (patches a side // 3)² patches and more, and an aspect
ratio from .3 to 1/.3; one that would hide too much, or nothing new, is drawn again, ten times at most.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..common.views.drawing import exp, key_of, log, uniform

LOW, HIGH, RATIO, ATTEMPTS = 0.1, 0.5, 0.3, 10
EPOCHS = 1 << 32
"""View ids that are left for views: a mask is of (seed, image id, view id, epoch), and the same wherever it is drawn."""


def block_masks(seed: int, image_ids: np.ndarray, view_ids: np.ndarray, epoch: int, side: int) -> Tensor:
    """(B, n, side, side) bool of B images and n views."""
    masks = np.zeros((len(image_ids), len(view_ids), side, side), np.bool_)
    views = view_ids.astype(np.int64) + (epoch + 1) * EPOCHS
    _draw_masks(np.uint64(seed % 2**64), np.asarray(image_ids, np.int64), views, masks)
    return torch.from_numpy(masks)


@njit(cache=True, nogil=True)
def _draw_masks(seed, image_ids, view_ids, masks):
    for i in range(len(image_ids)):
        for v in range(len(view_ids)):
            _draw_mask(key_of(seed, image_ids[i], view_ids[v]), masks[i, v])


@njit(cache=True, nogil=True)
def _draw_mask(key, mask):
    side = len(mask)
    if uniform(key, 0, 0.0, 1.0) < 0.5:
        return
    most = uniform(key, 1, LOW, HIGH) * side * side
    smallest = float((side // 3) ** 2)
    hidden, counter = 0, 2
    while hidden < most:
        new = 0
        for _ in range(ATTEMPTS):
            area = uniform(key, counter, smallest, most - hidden)
            ratio = exp(uniform(key, counter + 1, log(RATIO), -log(RATIO)))
            height = int(np.floor(np.sqrt(area * ratio) + 0.5))
            width = int(np.floor(np.sqrt(area / ratio) + 0.5))
            top = int(uniform(key, counter + 2, 0.0, side - height + 1.0))
            left = int(uniform(key, counter + 3, 0.0, side - width + 1.0))
            counter += 4
            if height >= side or width >= side:
                continue
            block = mask[top : top + height, left : left + width]
            fresh = height * width - block.sum()
            if 0 < fresh <= most - hidden:
                block[:, :] = True
                new = fresh
                break
        if new == 0:
            break
        hidden += new
