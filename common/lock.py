"""One process at a time: a file that is locked while somebody writes beside it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MisuseError


def lock_file(path: Path, taken: str) -> int:
    """The descriptor whose closing, or the death of this process, lets others lock ``path``, which is made with its folder.

    MisuseError, which says ``taken``, when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if not lock(descriptor):
        os.close(descriptor)
        raise MisuseError(taken)
    return descriptor


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """`lock_file` for as long as a block runs; the file goes with it."""
    descriptor = lock_file(path, taken)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock the file of ``descriptor``, which is open for writing, until it is closed; False when another process holds it.

    A record lock, because forked data-loading workers, which outlive a killed parent for seconds, do not inherit it. A file
    system without locks is as good as one where nobody else is.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
