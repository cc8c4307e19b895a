"""The identity of a network's weights, and tensors in a file that says when it is damaged."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from .files import open_regular
from .records import DamagedError, NoChecksumError, crc32c


def hash_weights(tensors: Mapping[str, Tensor], pooling: str | None = None, code: str | None = None) -> str:
    """sha256 (hex) over names, types, shapes and bytes in sorted order: equal for equal weights, whatever file they came in.

    ``pooling`` says what becomes of the network's tokens, where that is not the network's own way, ``code`` where its code is,
    where that is the user's own.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if pooling is not None:
        digest.update(f"pooling {pooling}\n".encode())
    if code is not None:
        digest.update(f"code {code}\n".encode())
    return digest.hexdigest()


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with the checksum of all that is in it among its metadata; the same bytes for the same content."""
    data = serialise_tensors(dict(tensors), {**metadata, "crc32c": _checksum(tensors, metadata)})
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])  # whose metadata safetensors puts in an order that every process draws anew
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[start:]])


def read_tensor_file(path: Path, foreign: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a file that `tensor_file` made. OSError; DamagedError: none, or damaged."""
    with open_regular(path):  # safetensors would wait for a pipe
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise DamagedError("is truncated or no safetensors file") from error
    sealed = metadata.pop("crc32c", None)
    if sealed is None and foreign:
        return tensors, metadata  # of another tool, which gives no checksum
    if sealed is None:
        raise NoChecksumError("has no checksum: it is of a rob from before checksums, or of another tool")
    if sealed != _checksum(tensors, metadata):
        raise DamagedError("is damaged or was edited: its checksum does not match")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    parts: list = [json.dumps(dict(metadata), sort_keys=True).encode()]
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        parts.append(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        parts.append(plain.reshape(-1).view(torch.uint8).numpy())
    return crc32c(*parts)
