"""Matrix products of half-precision operands that keep their float32 sums, by the device's library."""

from functools import cache

import torch
from torch import Tensor

FEWEST_PER_PART = 1024
"""Terms of a sum below which it is not split any further."""


@cache
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies ``dtype`` into float32 on this device."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    a = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(a, a, out_dtype=torch.float32)
        torch.bmm(a[None], a[None], out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) float32 a b of (M, K) and (K, N), both of one dtype up to float32 and of any strides."""
    if _widens(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """``product`` where K is long beside M and N: (P, M, N) float32, which add up to it, so that all of a GPU's processors share
    the sums.

    The parts' number depends on the shapes alone: added in order, the same inputs give the same bits.
    """
    (m, k), n = a.shape, b.shape[1]
    parts = parts_of(m, k, n, processors(a.device))
    if parts == 1:
        return product(a, b).unsqueeze(0)
    a, b = a.reshape(m, parts, k // parts).transpose(0, 1), b.reshape(parts, k // parts, n)
    if _widens(a.device, a.dtype):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def parts_of(m: int, k: int, n: int, processors: int) -> int:
    """How many parts to cut K into: a power of two that divides it and keeps its parts aligned, until the output tiles of all
    parts are two a processor."""
    tiles, parts = -(-m // 128) * -(-n // 128), 1
    while tiles * parts < 2 * processors and k % (16 * parts) == 0 and k // (2 * parts) >= FEWEST_PER_PART:
        parts *= 2
    return parts


@cache
def processors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
