"""Weights files of any origin, read without running what is in them, and unwrapped."""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import MisuseError
from .files import open_regular
from .records import DamagedError
from .weights import read_tensor_file

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


def under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with ``prefix``, without it; of a name equal to ``prefix`` the rest is empty."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
