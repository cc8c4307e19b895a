"""KoLeo: features of different images keep apart (1806.03198; DINOv2, 2304.07193, section 4).

    koleo(x) = sum_v mean_b -log( || x[b,v] - x[n,v] || ),   n the image whose x[n,v] is nearest to x[b,v]

of unit rows, a view at a time: two views of one image are no neighbours. Neighbours are looked for among this rank's images,
as in DINOv2 and DINOv3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.target import widened

TINY = 1e-8
"""Added to each component of the difference and to the distance, as in ``koleo_loss.py``: twins are no infinity."""


def koleo(features: Tensor) -> Tensor:
    """The sum above, a scalar in float32 or wider: features (B, V, F), normalised here."""
    with torch.autocast(features.device.type, enabled=False):
        rows = F.normalize(features.to(widened(features.dtype)).transpose(0, 1), dim=-1, eps=TINY)
        similar = (rows @ rows.mT).detach()
        similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = similar.argmax(dim=-1, keepdim=True).expand_as(rows)
        distance = F.pairwise_distance(rows, rows.gather(1, nearest), eps=TINY)
        return -(distance + TINY).log().mean(dim=1).sum()
