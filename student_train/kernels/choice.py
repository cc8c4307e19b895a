"""Which implementation of the prototype cross-entropy "auto" takes: the one place that says so."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

SMALLEST_CHUNKED = 1 << 15
"""Student logits (B V K) from which `chunked` is at least as fast as `reference` on a CPU: benchmarks/loss_notes.md."""

SMALLEST_FUSED = 1 << 25
"""The same for the fused forms on CUDA. On an H200 (2026-11-26) `reference` took 1.3 to 1.4 ms at 10 million and
5.7 at 168, the fused forms 2 to 3 ms at either, which is what it takes to launch them: they meet between 32 and 75 million."""

REFERENCE_BYTES = 12
"""Of memory that `reference` holds a student logit on CUDA (the same run)."""

MEMORY_SHARE = 64
"""`reference` may take this part of a GPU's memory."""


@dataclass(frozen=True)
class Measured:
    """The fastest implementation at one size, under half precision."""

    prototypes: int
    width: int
    impl: str


_measured: dict[tuple[int, int], tuple[Measured, ...]] = {}


def use_measured(capability: tuple[int, int], sizes: Iterable[Measured]) -> None:
    """From here on "auto" takes, on GPUs of this compute capability, what was fastest at the most similar of ``sizes``. An
    empty ``sizes`` forgets earlier measurements."""
    _measured[capability] = tuple(sizes)


def fastest(device: torch.device, dtype: torch.dtype, rows: int, prototypes: int, width: int) -> str:
    """ "triton", "chunked" or "reference" for ``rows`` student rows of ``width`` against ``prototypes``.

    dtype: of the operands of the matrix products.
    """
    logits = rows * prototypes
    if device.type != "cuda":
        return "chunked" if logits >= SMALLEST_CHUNKED else "reference"
    if logits < min(SMALLEST_FUSED, _memory(device) // (MEMORY_SHARE * REFERENCE_BYTES)):
        return "reference"
    if not has_kernels(device, dtype):
        return "chunked"
    capability = torch.cuda.get_device_capability(device)
    return by_size(capability, dtype, prototypes, width)


def by_size(capability: tuple[int, int], dtype: torch.dtype, prototypes: int, width: int) -> str:
    """The same where both fused forms run, `triton` where nothing was measured on such a GPU: on an H200 (2026-11-26) it was as
    fast as `chunked` at 65,536 prototypes of any width and twice as fast at 262,144 (benchmarks/README.md)."""
    tensor_cores = dtype.itemsize == 2 or torch.get_float32_matmul_precision() != "highest"
    if capability < (8, 0) or not tensor_cores:
        return "chunked"
    if dtype == torch.float16:
        return "chunked"  # float16 holds no exponentials relative to a bound: the kernel would score every row twice
    similar = min(
        _measured.get(capability, ()),
        key=lambda m: abs(math.log2(m.prototypes / prototypes)) + abs(math.log2(m.width / width)),
        default=None,
    )
    return similar.impl if similar else "triton"


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run there: on CUDA, but not in float64."""
    return device.type == "cuda" and dtype.itemsize <= 4 and _triton()


@cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


@cache
def _triton() -> bool:
    return find_spec("triton") is not None
