"""Memory that a process frees and takes again."""

import ctypes
import subprocess
import sys

import pytest

BLOCK, TIMES = 64 << 20, 5
FAULTS = f"""
import resource, sys
import numpy as np
from rob.common.heap import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
np.ones({BLOCK}, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    np.ones({BLOCK}, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")
def test_freed_blocks_are_taken_again_without_asking_the_kernel_for_their_pages():
    command = [sys.executable, "-c", FAULTS]
    given_back, kept = (int(subprocess.check_output([*command, how])) for how in ("given back", "kept"))
    assert given_back > 100  # huge pages of 2 MiB would be 160
    assert kept < given_back / 10


KEPT = f"""
import numpy as np
from rob.common.heap import keep_freed_memory, kept_bytes

keep_freed_memory()
before = kept_bytes()
np.ones({BLOCK}, np.uint8)
print(kept_bytes() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not say what it keeps")
def test_what_is_kept_is_told():
    assert int(subprocess.check_output([sys.executable, "-c", KEPT])) > 0.9 * BLOCK
