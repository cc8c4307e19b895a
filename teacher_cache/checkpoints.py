"""Published checkpoint files: read without running what is in them, unwrapped, and taken apart.

Shapes are never written down here: depth, widths, K, BatchNorm and weight norm of a head are read off its tensors.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import MisuseError
from ..common.files import open_regular
from ..common.heads import Activation, ProjectionHead
from ..common.records import DamagedError
from ..common.weights import read_tensor_file

Tensors = dict[str, Tensor]

NUMPY_SCALAR = np.float64(0).__reduce__()[0]
"""What numpy's scalars are pickled by."""

HARMLESS_GLOBALS: list[Any] = [
    argparse.Namespace,  # DINO and iBOT keep their command line beside the weights
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # losses and learning rates kept as numpy scalars:
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),  # numpy 1's name and numpy 2's
    np.dtype,
    *(type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")),
]
"""What a pickle may name besides tensors and plain containers. Everything else is refused, and nothing is executed."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
"""Name segments added by DataParallel and DDP, ``torch.compile`` and FSDP, wherever they wrapped."""

AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
"""Keys of the averaged weights, which are better than the raw ones beside them; timm takes them, too."""
CONTAINERS = (*AVERAGES, "state_dict", "model", "model_state_dict")
"""Keys under which files keep the weights apart from the epoch and the optimiser; ``model.`` also leads Lightning's names."""
WEIGHT_NORM = {"original0": "weight_g", "original1": "weight_v"}
"""``parametrizations.weight.*``, torch's newer names of a layer's gain and directions, and the older ones."""
OTHER_FILES = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with git lfs pull",
    b"<!doctype": "a web page, not a checkpoint: the download asked for something in between; fetch the file itself",
    b"<html": "a web page, not a checkpoint: the download asked for something in between; fetch the file itself",
    b"<?xml": "an error message of a file server, not a checkpoint: fetch it again",
}
"""By how a file begins."""


def read_tensors(path: Path) -> Tensors:
    """Every tensor of a ``.safetensors`` or PyTorch file, on the CPU, by its dotted name less wrappers and containers.

    Raises ``MisuseError`` for a file that is missing, truncated or of another kind, and for a pickle with code in it.
    """
    if not path.is_file():
        raise MisuseError(f"checkpoint {path} does not exist; give the path of a .safetensors, .pth, .pt or .bin file")
    content = _read(path)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if any(_walk(content.get(key), (key,)))), None)
        inner = inner if isinstance(inner, Mapping) else None
        if inner is None:
            break
        content = inner
    tensors: Tensors = {}
    for segments, tensor in _walk(content):
        segments = [segment for segment in segments if segment not in WRAPPERS]
        if len(segments) > 1 and segments[0] in CONTAINERS:
            segments = segments[1:]
        if segments[-3:-1] == ["parametrizations", "weight"] and segments[-1] in WEIGHT_NORM:
            segments = [*segments[:-3], WEIGHT_NORM[segments[-1]]]
        tensors[".".join(segments)] = tensor
    if not tensors:
        raise MisuseError(f"checkpoint {path} holds no tensors; a model's weights were expected")
    return tensors


def _read(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            begins = file.read(100)
    except OSError as error:
        raise MisuseError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    for beginning, what in OTHER_FILES.items():
        if begins.lstrip().lower().startswith(beginning):
            raise MisuseError(f"checkpoint {path} is {what}")
    if path.suffix == ".safetensors" or (begins[8:9] == b"{" and begins[5:8] == bytes(3)):  # whatever it is called
        try:
            return read_tensor_file(path, foreign=True)[0]
        except (DamagedError, OSError) as problem:
            raise MisuseError(f"checkpoint {path} {problem}; fetch or make it again") from problem
    try:
        with torch.serialization.safe_globals(HARMLESS_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        if culprit and re.search(r"fsdp|_shard", culprit[1], re.IGNORECASE):
            raise MisuseError(
                f"checkpoint {path} is one rank's part of a training run (FSDP), not a network's weights: take the teacher's "
                "exported checkpoint, such as teacher_checkpoint.pth"
            ) from error
        if culprit is None:
            raise MisuseError(f"checkpoint {path} is not a PyTorch file or is corrupt; fetch it again") from error
        raise MisuseError(
            f"checkpoint {path} was refused, and nothing in it was run: its pickle asks for {culprit[1]} where only tensors are "
            "read; save the bare state_dict, best as .safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, IndexError) as error:
        # What files that were cut off make torch raise.
        raise MisuseError(f"checkpoint {path} is truncated or not a PyTorch file; fetch it again") from error


def _walk(node: Any, segments: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Tensor]]:
    """Tensors of nested dictionaries, with the segments of their names; whatever else a file keeps is passed over."""
    if isinstance(node, Tensor) and segments:
        yield list(segments), node
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _walk(value, (*segments, *str(key).split(".")))


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


def take_apart(tensors: Tensors, layout: Layout) -> Parts:
    """The parts of ``tensors`` (from ``read_tensors``) by ``layout``."""
    branch = next((b for b in layout.branches if any(name.startswith(b) for name in tensors)), "")
    encoder = under(tensors, branch)
    head = under(encoder, layout.head) if layout.head else {}
    # MSN keeps its prototypes beside the encoders, all others inside.
    prototypes = (under(encoder, layout.prototypes) or under(tensors, layout.prototypes)) if layout.prototypes else {}
    taken = tuple(prefix for prefix in (layout.head, layout.prototypes) if prefix)
    rest = {name: tensor for name, tensor in encoder.items() if not name.startswith(taken)}
    centre = tensors.get(layout.centre) if layout.centre else None
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
    )


def under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with ``prefix``, without it; of a name equal to ``prefix`` the rest is empty."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
