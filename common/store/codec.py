"""What a cached target is made of: a teacher's embedding or its prototype logits <-> the arrays of the store.

Shapes: R rows (images), V cached views, D embedding dimensions, K prototypes, k kept prototypes, T ladder temperatures.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import FailureError
from .encodings import PATCHES, Encoding
from .patches import PatchEncoding


def encode(
    encoding: Encoding, embedding: Tensor | np.ndarray | None, logits: Tensor | np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Embedding (..., D) and raw logits (..., K), float32 on any device -> the arrays to store, see ``Encoding.layout``.

    Only what the kind stores is read; the other may be None. Raises FailureError when a value is NaN, infinite, or
    too large for what stores it.
    """
    values = torch.as_tensor(logits if encoding.needs_logits else embedding).detach().float()
    if encoding.kind == "embedding":
        arrays = _encode_embedding(values, encoding.dtype)
    else:
        arrays = {"logits": values.half()} if encoding.kind == "dense" else _encode_topk(values, encoding)
    if not all(torch.isfinite(stored).all() for name, stored in arrays.items() if name != "tail"):
        raise FailureError(
            f"the teacher's output is NaN, infinite, or too large for the {encoding.kind} encoding: check its weights, "
            "its precision and its input normalisation"
        )
    layout = encoding.layout(values.shape[-1], values.shape[-1])
    return {name: stored.cpu().numpy().astype(layout[name][1], copy=False) for name, stored in arrays.items()}


def decode(encoding: Encoding, arrays: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    """Stored arrays -> what the loss reads, on the arrays' own device: floats as float32, ids as int64.

    ``embedding`` gives {embedding}, ``topk`` {ids, logits, tail}, ``dense`` {logits}. Patch targets among them are left alone.
    """
    tensors = {name: torch.as_tensor(values) for name, values in arrays.items() if not name.startswith(PATCHES)}
    if "scale" in tensors:
        return {"embedding": tensors["embedding"] * tensors["scale"].float()[..., None]}
    return {name: _widen(values) for name, values in tensors.items()}


def encode_patches(encoding: PatchEncoding, rows: Tensor | None, logits: Tensor | None = None) -> dict[str, np.ndarray]:
    """Rows (..., P, C), or their logits (..., P, K) where those are stored, to the arrays of ``PatchEncoding.layout``."""
    return {PATCHES + name: values for name, values in encode(encoding.of_one, rows, logits).items()}


def decode_patches(encoding: PatchEncoding, arrays: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    """As `decode`, of the patch targets among a store's arrays: {embedding} or {ids, logits, tail}, each (..., P, n)."""
    own = {name.removeprefix(PATCHES): values for name, values in arrays.items() if name.startswith(PATCHES)}
    return decode(encoding.of_one, own)


def _encode_embedding(embedding: Tensor, dtype: str) -> dict[str, Tensor]:
    if dtype != "int8":
        return {"embedding": embedding.to(getattr(torch, dtype))}
    # Quantised by the scale as stored, so that rounding the scale to fp16 costs nothing.
    scale = (embedding.abs().amax(-1) / 127).half()
    steps = torch.nan_to_num(embedding / scale.float()[..., None]).round().clamp(-127, 127)
    return {"embedding": steps.to(torch.int8), "scale": scale}


def _encode_topk(logits: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    kept, ids = logits.topk(min(encoding.k, logits.shape[-1]), dim=-1, sorted=True)
    rest = logits.scatter(-1, ids, -torch.inf)  # a whole row of -inf when K <= k: the tail is then -inf
    tail = torch.stack([torch.logsumexp(rest / temp, dim=-1) for temp in encoding.temps], dim=-1)
    return {"ids": ids, "logits": kept.half(), "tail": tail}


def _widen(values: Tensor) -> Tensor:
    """float32 for stored floats, int64 for ids."""
    return values.to(torch.int64 if values.dtype in (torch.uint16, torch.uint32) else torch.float32)
