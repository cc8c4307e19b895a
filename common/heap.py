"""Memory that a process frees and takes again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Have glibc hand what was freed to the next tensor; False: this C library is another one.

    By default it maps every block of more than 32 MB for itself and gives it back at once, so that the kernel has to find and
    zero each of its pages again for the next layer. A teacher's feature maps are such blocks: on a CPU that took longer than the
    layers (``benchmarks/heap.py``). The process then keeps until its end the most that it had.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
