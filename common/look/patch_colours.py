"""Features of patches as colours: places that a network finds alike have the same one, in all pictures that are drawn together.

The three principal components of largest variance are red, green and blue, as in DINOv2 (2304.07193, figure 1).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..patches import BASIS, MEAN, fit_pca
from ..store.encodings import PATCHES
from ..store.reader import TargetStore
from .neighbours import unit_vectors

OUTLIERS = 0.02
"""Share of the places beyond each end of a colour's range."""
LEAST_RANGE = 0.25
"""Of the first component's, that a component is stretched to the whole range of its colour from: less is noise, and looks it."""
STRENGTH = 0.62
"""Of colours over the grey picture that is behind them."""


def cached_maps(store: TargetStore, image_ids: np.ndarray) -> Tensor:
    """The patch targets of some images' V cached views, (B, V, C, grid, grid) float32, as the student meets them: C components
    of a token, or of what goes into the prototypes; where their largest logits are kept, those and zeros for the others.
    """
    assert store.patches is not None
    found = store.decode(store.rows(image_ids))
    decoded = {name.removeprefix(PATCHES): values for name, values in found.items() if name.startswith(PATCHES)}
    rows = decoded["embedding"] if "embedding" in decoded else unit_vectors(decoded, store.patches.num_prototypes)
    return rows.mT.unflatten(-1, (store.patches.grid, store.patches.grid)).float()


def patch_colours(maps: Tensor) -> np.ndarray:
    """Maps (N, C, h, w) to (N, h, w, 3) uint8; the colours are of all N together."""
    rows = maps.float().movedim(1, -1)
    places = rows.flatten(0, 2)
    pca = fit_pca([places], min(3, *places.shape))
    mean, basis = torch.from_numpy(pca[MEAN]), torch.from_numpy(pca[BASIS])
    found = F.pad((places - mean) @ basis.T, (0, 3 - len(basis)))
    low, high = found.quantile(OUTLIERS, dim=0), found.quantile(1 - OUTLIERS, dim=0)
    wide = (high - low).maximum(LEAST_RANGE * (high - low).max()).clamp_min(1e-12)
    shares = (0.5 + (found - (low + high) / 2) / wide).clamp(0, 1)
    return (255 * shares).round().byte().unflatten(0, rows.shape[:3]).numpy()


def laid_over(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) uint8, enlarged, over the picture (H, W, 3) uint8 in grey."""
    wide = torch.from_numpy(colours).movedim(2, 0)[None].float()
    wide = F.interpolate(wide, pixels.shape[:2], mode="bilinear", align_corners=False)[0].movedim(0, 2).numpy()
    grey = pixels.mean(2, keepdims=True)
    return (STRENGTH * wide + (1 - STRENGTH) * grey).round().astype(np.uint8)
