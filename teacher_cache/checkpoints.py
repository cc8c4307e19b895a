"""Published checkpoint files, taken apart.

Shapes are never written down here: depth, widths, K, BatchNorm and weight norm of a head are read off its tensors.
"""

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.heads import Activation, ProjectionHead
from ..common.tensors import Tensors, under


@dataclass(frozen=True)
class Layout:
    """Where a family's files keep the parts, by prefix of the tensors' names. What is no other part is the backbone."""

    branches: tuple[str, ...] = ()
    """Prefixes of the encoder to take, best first, in files that hold several (teacher and student, query and key)."""
    backbone: str = ""
    """A file without this prefix is taken for a bare backbone."""
    head: str | None = None
    prototypes: str | None = None
    patch_prototypes: str | None = None
    centre: str | None = None
    """Full name of DINO's running mean of the teacher's logits, which some files keep with the loss."""
    patch_centre: str | None = None
    """The same of patches' logits: iBOT's."""
    activation: Activation = "gelu"
    unit_prototypes: bool = False
    """The method normalises its prototypes before every use."""


@dataclass(frozen=True)
class Parts:
    """One teacher, taken out of its file; None for what the file lacks."""

    backbone: Tensors = field(default_factory=dict)
    head: ProjectionHead | None = None
    prototypes: Tensor | None = None
    """(K, D) float32 effective rows: logits are ``embedding @ prototypes.T``."""
    patch_prototypes: Tensor | None = None
    """The same for patches, where they are others."""
    centre: Tensor | None = None
    """(K,) float32."""
    patch_centre: Tensor | None = None
    """The same of patches."""


def take_apart(tensors: Tensors, layout: Layout) -> Parts:
    """The parts of ``tensors`` (from ``read_tensors``) by ``layout``."""
    branch = next((b for b in layout.branches if any(name.startswith(b) for name in tensors)), "")
    encoder = under(tensors, branch)
    head = under(encoder, layout.head) if layout.head else {}
    # MSN keeps its prototypes beside the encoders, all others inside.
    prototypes = (under(encoder, layout.prototypes) or under(tensors, layout.prototypes)) if layout.prototypes else {}
    taken = tuple(prefix for prefix in (layout.head, layout.prototypes) if prefix)
    rest = {name: tensor for name, tensor in encoder.items() if not name.startswith(taken)}
    centre, patch_centre = (tensors.get(name) if name else None for name in (layout.centre, layout.patch_centre))
    own = prototype_rows(prototypes, layout.unit_prototypes)
    of_patches = under(encoder, layout.patch_prototypes) if layout.patch_prototypes else {}
    patches = prototype_rows(of_patches, layout.unit_prototypes)
    shared = patches is None or (own is not None and torch.equal(patches, own))
    return Parts(
        backbone=under(rest, layout.backbone) or rest,
        head=projection_head(head, layout.activation),
        prototypes=own,
        patch_prototypes=None if shared else patches,
        centre=None if centre is None else centre.float().flatten(),
        patch_centre=None if patch_centre is None else patch_centre.float().flatten(),
    )


def projection_head(tensors: Tensors, activation: Activation) -> ProjectionHead | None:
    """The MLP whose layers ``tensors`` holds, whatever they are called, or None where there are not two linear layers.

    Two-dimensional weights are the linear layers and one-dimensional ones the BatchNorms, each in natural order of
    their names. A linear layer without bias gets a zero one, and a BatchNorm after the last layer (MoCo-v3) is folded
    into it, which in eval mode is the same function: one class then holds every published head.
    """
    weights = {name: t.float() for name, t in tensors.items() if name.endswith("weight")}
    modules = sorted((name.removesuffix("weight") for name in weights), key=_natural)
    linears = [module for module in modules if weights[module + "weight"].ndim == 2]
    norms = sorted((name[: -len("running_mean")] for name in tensors if name.endswith("running_mean")), key=_natural)
    if len(linears) < 2 or len(norms) not in (0, len(linears) - 1, len(linears)):
        return None
    hidden_dim, in_dim = weights[linears[0] + "weight"].shape
    out_dim = len(weights[linears[-1] + "weight"])
    head = ProjectionHead(in_dim, hidden_dim, out_dim, len(linears), activation, norm=bool(norms))
    own_linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    own_norms = [layer for layer in head.mlp if isinstance(layer, nn.BatchNorm1d)]
    for module, linear in zip(linears, own_linears, strict=True):
        bias = tensors.get(module + "bias", torch.zeros(linear.out_features))
        linear.load_state_dict({"weight": weights[module + "weight"], "bias": bias})
    for module, norm in zip(norms, own_norms, strict=False):
        norm.load_state_dict(norm.state_dict() | under(tensors, module))
    if len(norms) == len(linears):
        _fold_norm(own_linears[-1], under(tensors, norms[-1]))
    return head


def _fold_norm(linear: nn.Linear, norm: Tensors, eps: float = 1e-5) -> None:
    gain = norm.get("weight", torch.ones(linear.out_features)) / (norm["running_var"] + eps).sqrt()
    with torch.no_grad():
        linear.weight.mul_(gain[:, None])
        linear.bias.sub_(norm["running_mean"]).mul_(gain).add_(norm.get("bias", torch.zeros(linear.out_features)))


def prototype_rows(tensors: Tensors, unit: bool) -> Tensor | None:
    """The effective prototype rows (K, D) of a weight-normed or a plain layer, normalised if ``unit``, or None.

    Weight norm keeps its gain: DINO trains it where ``norm_last_layer`` is false. Of several matrices, DeepCluster-v2's
    one for each of its clusterings, the first is taken: a softmax over all of them together is no distribution that was
    trained.
    """
    if "weight_v" in tensors:
        return tensors["weight_g"].float() * F.normalize(tensors["weight_v"].float(), dim=1)
    names = sorted((name for name, tensor in tensors.items() if tensor.ndim == 2), key=_natural)
    if not names:
        return None
    rows = tensors[names[0]].float()
    return F.normalize(rows, dim=1) if unit else rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with numbers by value: ``mlp.2`` before ``mlp.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
