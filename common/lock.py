"""One process at a time: a file that is locked while somebody writes beside it."""

import errno
import fcntl
import os
from pathlib import Path

from .errors import MisuseError


def lock_file(path: Path, taken: str) -> int:
    """The descriptor whose closing, or the death of this process, lets others lock ``path``, which is made with its folder.

    A record lock, because forked data-loading workers, which outlive a killed parent for seconds, do not inherit it.
    MisuseError, which says ``taken``, when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # else the file system has no locks: as good as it gets
            os.close(descriptor)
            raise MisuseError(taken) from None
    return descriptor
