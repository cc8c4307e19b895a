"""Projection heads and prototypes: the same classes for the teacher's published head and for the student's fresh one.

Every method of the table ends alike: an MLP projects the backbone's feature, the projection is L2-normalised, and a
bias-free linear layer compares it with K prototypes. They differ in depth, activation, BatchNorm, and in how the
prototypes are scaled:

=================  ======  ==========  =========  =============================================  =====================
method             layers  activation  BatchNorm  prototypes                                     source
=================  ======  ==========  =========  =============================================  =====================
DINO, iBOT (ViT)   3       GELU        no         weight norm, gain 1 or learned                 dino ``DINOHead``
DINO (ResNet-50)   2       GELU        yes        plain rows                                     dino issue 189
SwAV, DeepCluster  2       ReLU        yes        unit rows                                      swav ``resnet50.py``
MSN                3       GELU        yes        unit rows                                      msn ``msn_train.py``
MoCo-v2, DisCo     2       ReLU        no         none                                           moco ``builder.py``
=================  ======  ==========  =========  =============================================  =====================

RoB's students (2301.09451) have, besides these, a plain MLP whose last layer gives the logits: no bottleneck, no unit rows, a
bias a prototype. That layer is ``Prototypes`` with ``bias``, behind a ``ProjectionHead`` without ``out_dim``.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """MLP with an L2-normalised output: (N, in_dim) -> (N, out_dim) float32 unit rows.

    ``num_layers`` linear layers (1 or more) with ``activation`` between them; ``norm`` puts a BatchNorm before each
    activation, or where it would be. ``unit`` False leaves the rows as long as they are. An ``out_dim`` of None ends behind the
    last activation, where the last of ``num_layers`` linear layers is somebody else's: rows (N, hidden_dim), of any length. The
    layers live in ``mlp`` numbered as in the published DINO, SwAV and MoCo heads. Initialised as DINO: truncated normal of
    standard deviation .02, zero biases.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int | None,
        num_layers: int = 3,
        activation: Activation | None = "gelu",
        norm: bool = False,
        unit: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + ([] if out_dim is None else [out_dim])
        layers: list[nn.Module] = []
        for index in range(len(widths) - 1):
            linear = nn.Linear(widths[index], widths[index + 1])
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if index < num_layers - 1:
                layers += [nn.BatchNorm1d(hidden_dim)] if norm else []
                layers += [ACTIVATIONS[activation]()] if activation else []
        self.mlp = nn.Sequential(*layers)
        self.in_dim, self.out_dim = in_dim, widths[-1]
        self.unit = unit and out_dim is not None

    def forward(self, features: Tensor) -> Tensor:
        """Rows (N, out_dim), in float32 also under autocast: half precision costs a unit vector three decimals."""
        projected = self.mlp(features)
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(projected, dim=-1) if self.unit else projected


class Prototypes(nn.Module):
    """K directions that embeddings are compared with: ``logits = embedding @ matrix().T + bias``.

    ``weight_norm=True`` keeps a direction ``weight_v`` (K, D) and a gain ``weight_g`` (K, 1) a row, the names of DINO's
    files; the effective row is ``g * v / |v|``. The gain is fixed at 1 unless ``learn_gain`` (DINO's
    ``norm_last_layer=False``), so the rows are unit vectors, as SwAV and MSN want them too. ``weight_norm=False`` is a
    plain matrix ``weight`` (K, D). ``bias`` (K,) is learned from 0 where asked for, else None.
    """

    bias: nn.Parameter | None

    def __init__(
        self, num: int, dim: int, weight_norm: bool = True, learn_gain: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        bound = dim**-0.5  # nn.Linear's, which every published method starts from
        rows = torch.empty(num, dim).uniform_(-bound, bound)
        self.num, self.dim, self.weight_norm = num, dim, weight_norm
        if weight_norm:
            self.weight_v = nn.Parameter(rows)
            self.weight_g = nn.Parameter(torch.ones(num, 1), requires_grad=learn_gain)
        else:
            self.weight = nn.Parameter(rows)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num)) if bias else None)

    def matrix(self) -> Tensor:
        """The effective rows, (K, D) float32."""
        if (
            self.weight_norm and self.weight_v.is_cuda
        ):  # one pass forward and one back, where torch's operations take nine
            return torch._weight_norm(self.weight_v, self.weight_g, 0)
        if self.weight_norm:
            return self.weight_g * F.normalize(self.weight_v, dim=1)
        return self.weight

    def forward(self, embedding: Tensor) -> Tensor:
        """Logits (N, K) of embeddings (N, D), before any temperature or centre."""
        return F.linear(embedding, self.matrix(), self.bias)
