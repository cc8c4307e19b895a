"""Files that other processes may touch, or a kill may cut: locks, replacement as a whole, and naming what differs."""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import FailureError, MisuseError


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


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes ``path``'s place only once all of it is on disk. FailureError: it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save wraps a failed write in a RuntimeError
            raise
        kept = f"; the earlier {path.name} is kept" if path.exists() else ""
        raise FailureError(f"cannot write {path}: {_first_line(error)}{kept}") from error


def _first_line(error: BaseException) -> str:
    """The operating system's words where there are any: they say "No space left on device", torch's do not."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause.strerror or str(cause) if isinstance(cause, OSError) else str(error).splitlines()[0]


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first field that differs, or None; of an object in a list, too.

    A field that is missing is None: an option added since has None for what was always done.
    """
    if isinstance(old, list) and isinstance(new, list) and any(isinstance(value, dict) for value in old):
        old, new = ({str(n): value for n, value in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            inner = f"{name}.{key}" if name else key
            difference = first_difference(old.get(key), new.get(key), inner)
            if difference:
                return difference
        return None
    return None if old == new else (name, old, new)


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One phrase for each value of ``asked`` that ``stored`` does not have."""
    for name, value in asked.items():
        old, new = _numbered(stored.get(name)), _numbered(value)
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} is {_short(old)} in the store, not {_short(new)}"


def _numbered(value: Any) -> Any:
    """A list of objects, such as a recipe's crops, as an object of them by number."""
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        return {str(number): entry for number, entry in enumerate(value)}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-30:]}"
