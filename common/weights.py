"""The identity of a network's weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def hash_weights(tensors: Mapping[str, Tensor], pooling: str | None = None) -> str:
    """sha256 (hex) over names, types, shapes and bytes in sorted order: equal for equal weights, whatever file they came in.

    ``pooling`` says what becomes of the network's tokens, where that is not the network's own way.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if pooling is not None:
        digest.update(f"pooling {pooling}\n".encode())
    return digest.hexdigest()
