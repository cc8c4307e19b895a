"""Files that other processes may touch, or a kill may cut: locks, replacement as a whole, and naming what differs."""

import ctypes
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import FailureError, MisuseError, first_line

PIECE = 1 << 20
"""Bytes that are asked for at once of a file that is longer than it was."""
LARGEST_FILE = 1 << 35
"""Bytes of one file that is read as a whole, unless less is asked for."""


def cache_folder() -> Path:
    """Rob's, in the user's cache: what can be fetched or measured again. Not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rob"


def lock_file(path: Path, taken: str) -> int:
    """The descriptor whose closing, or the death of this process, lets others lock ``path``, which is made with its folder.

    MisuseError, which says ``taken``, when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if (descriptor := open_locked(path)) is None:
        raise MisuseError(taken)
    return descriptor


def open_locked(path: Path, shared: bool = False) -> int | None:
    """The same, of a folder that is there; None when another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not lock(descriptor, shared):
            os.close(descriptor)
            return None
        if is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # whoever held it has removed it meanwhile: others lock the next file of this name


def is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is still the file of ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def wait_for_lock(path: Path, seconds: float) -> None:
    """Wait until nobody holds ``path``, where there is such a file, or for so long."""
    end = time.monotonic() + seconds
    while path.exists() and time.monotonic() < end:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        free = lock(descriptor)
        os.close(descriptor)
        if free:
            return
        time.sleep(0.2)


@contextmanager
def locked(path: Path, taken: str, wait: bool = False) -> Iterator[None]:
    """`lock_file` for as long as a block runs; the file goes with it. ``wait``: until others let it go."""
    descriptor = None
    while wait and (descriptor := open_locked(path)) is None:
        time.sleep(0.2)
    if descriptor is None:
        descriptor = lock_file(path, taken)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def lock(descriptor: int, shared: bool = False) -> bool:
    """Lock the file of ``descriptor``, which is open for writing, until it is closed; False when another process holds it.
    ``shared``: with others who share it; a lock of one's own becomes a shared one, and the other way round.

    A record lock, because forked data-loading workers, which outlive a killed parent for seconds, do not inherit it. A file
    system without locks is as good as one where nobody else is.
    """
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def unlock(descriptor: int) -> None:
    """Let others lock the file of ``descriptor``, which stays open."""
    with suppress(OSError):  # a file system without locks
        fcntl.lockf(descriptor, fcntl.LOCK_UN)


@contextmanager
def whole_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that is at ``path`` once all of it is on disk, and not before, even after a power cut.

    Until then it is ``temporary`` (``path`` with ``.tmp`` behind it), which a killed process leaves and the next one replaces.
    OSError is the caller's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        with new_file(temporary) as file:
            yield file
            flush_to_disk(file)
            if not os.path.samestat(os.fstat(file.fileno()), temporary.lstat()):
                raise OSError(errno.EBUSY, "another process is writing it", str(path))
            os.replace(temporary, path)
    except BaseException as error:
        if not (isinstance(error, OSError) and error.errno == errno.EBUSY):
            temporary.unlink(missing_ok=True)
        raise


def new_file(path: Path) -> BinaryIO:
    """A file of this process's own, locked: what is at ``path`` goes, so that nothing is written through a link.

    OSError, EBUSY: another process is writing there.
    """
    try:
        earlier = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise
    else:
        free = lock(earlier)
        os.close(earlier)
        if not free:
            raise OSError(errno.EBUSY, "another process is writing it", str(path))
    path.unlink(missing_ok=True)
    file = open(path, "xb")  # noqa: SIM115
    lock(file.fileno())
    return file


def append_to(path: Path) -> BinaryIO:
    """``path``, to be written at its end, and not through a link."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


def read_regular(path: Path | str, largest: int) -> bytes:
    """All bytes of a regular file. OSError: it is none (a pipe would never end, a device neither), or of more than ``largest``
    bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a file object would ask the system twice as often
    try:
        size = _regular_size(descriptor, path)
        pieces = [os.read(descriptor, size + 1)] if size <= largest else []
        length = sum(map(len, pieces))
        while (
            pieces and length != size and length <= largest and pieces[-1]
        ):  # it has grown, or the system does not know
            pieces.append(os.read(descriptor, PIECE))
            length += len(pieces[-1])
    finally:
        os.close(descriptor)
    if max(size, length) > largest:
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {largest:,} that are read", str(path))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading. OSError: it is a folder, a pipe or a device."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _regular_size(file.fileno(), path)
    except OSError:
        file.close()
        raise
    return file


def _regular_size(descriptor: int, path: Path | str) -> int:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def is_inside(name: str) -> bool:
    """Whether a path that a file gives stays in its folder."""
    return bool(name) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts


def flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`whole_file` for the files of a run. FailureError: it cannot be written, and whether there is an earlier one."""
    try:
        with whole_file(path) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch.save wraps a failed write in a RuntimeError
        kept = f"; the earlier {path.name} is kept" if path.exists() else ""
        raise FailureError(f"cannot write {path}: {_reason(error)}{kept}") from error


def _reason(error: BaseException) -> str:
    """The operating system's words where there are any: they say "No space left on device", torch's do not."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause.strerror or str(cause) if isinstance(cause, OSError) else first_line(error)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every field that differs, also in objects of a list, which go by their number.

    A field that is missing is None: an option added since has None for what was always done. Of two things with other names, such
    as recipes, the names are all that is said.
    """
    if isinstance(old, list) and isinstance(new, list) and any(isinstance(entry, dict) for entry in (*old, *new)):
        old, new = ({str(number): entry for number, entry in enumerate(entries)} for entries in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("name") != new.get("name"):
            old, new = ({"name": named.get("name")} for named in (old, new))
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    return next(differences(old, new), None)


def exchange(one: Path, other: Path) -> None:
    """Two files or folders of one file system change places: in one step where system and file system can (Linux, not NFS), else
    in three, between which ``other`` is at `aside` of itself."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is None or renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
        other.rename(aside(other))
        one.rename(other)
        aside(other).rename(one)


def aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """MisuseError: a file is there already, and nobody said that it may be replaced."""
    if path.is_file() and not overwrite:
        raise MisuseError(f"{path} is there already: pass `overwrite` to replace it, or give another name")
