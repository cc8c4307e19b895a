"""Memory that a process frees and takes again."""

import ctypes
import sys
from ctypes import Structure, c_size_t
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


class Mallinfo2(Structure):
    """Of glibc's malloc.h, from 2.33 on."""

    _fields_ = [(f"_{number}", c_size_t) for number in range(8)] + [("fordblks", c_size_t), ("_9", c_size_t)]


def keep_freed_memory() -> bool:
    """Have glibc hand what was freed to the next tensor; False: this C library is another one.

    By default it maps every block of more than 32 MB for itself and gives it back at once, so that the kernel has to find and
    zero each of its pages again for the next layer. A teacher's feature maps are such blocks: on a CPU that took longer than the
    layers (``benchmarks/heap.py``). The process then keeps until its end the most that it had.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def kept_bytes() -> int:
    """That were freed and are this process's still, for what it takes next; 0 where the C library does not say."""
    mallinfo2 = _of_glibc("mallinfo2")
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = Mallinfo2
    return mallinfo2().fordblks


def _of_glibc(name: str) -> Any:
    """The function; None: this system's C library is another one, or an older one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
