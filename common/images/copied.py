"""A ``.beton`` of a bucket, copied to this machine once: FFCV maps files into memory.

It lies under a name made of its address, and is held against what is in the bucket each time it is opened; a copy that was broken
off goes on where it was. Of the processes of one machine the first copies, and the others wait for it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import FailureError, MisuseError
from ..files import cache_folder, flush_to_disk, locked, replacing
from ..places import is_address, place_of, shown
from .manifest import LARGEST, manifest_path

PIECE = 8 << 20
"""Bytes of a request."""
AT_ONCE = 8
FOLDER = "ROB_LOCAL_DIR"
"""In the environment: where copies go, where no `local_dir` says so."""


def copies_of(address: str, folder: Path | None) -> Path:
    """Where what is copied from ``address`` lies, below ``folder``, else where the environment says, else in the user's cache."""
    folder = folder or Path(os.environ.get(FOLDER) or cache_folder() / "copied")
    return folder / hashlib.sha256(address.encode()).hexdigest()[:12]


def at_hand(
    path: Path,
    folder: Path | None,
    damaged: Callable[[Path], list[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """``path`` itself, or where the file of that address was copied to, below ``folder``. ``progress`` gets bytes, and
    ``damaged`` tells which images of a file are, or raises MisuseError.

    MisuseError: there is no such file, or no room for it. FailureError: it is not what its manifest says, or cannot be read.
    """
    if not is_address(path):
        return path
    address = shown(path)
    above, _, name = address.rpartition("/")
    place = place_of(above)
    try:
        text = place.read(f"{name}.json", LARGEST)
        size = place.size_of(name)
    except FileNotFoundError:
        raise MisuseError(
            f"there is no {address}, or no {name}.json beside it: copy both there, or give another"
        ) from None
    out = copies_of(address, folder) / name
    part = out.with_name(f"{name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{name}.lock"), f"{out} is being copied", wait=True):
        if out.exists() and out.stat().st_size == size and _is_text(manifest_path(out), text):
            return out
        if not _is_text(manifest_path(part), text):  # of another file that was at this address
            part.unlink(missing_ok=True)
        with replacing(manifest_path(part)) as file:
            file.write(text)
        _copy(lambda start: place.read_part(name, start, min(PIECE, size - start)), part, size, address, progress)
        _check(part, address, damaged)
        manifest_path(part).replace(manifest_path(out))
        part.replace(out)
    return out


def _is_text(path: Path, text: bytes) -> bool:
    return path.exists() and path.stat().st_size == len(text) and path.read_bytes() == text


def _copy(
    read: Callable[[int], bytes], part: Path, size: int, address: str, progress: Callable[[int, int], None]
) -> None:
    """The pieces that ``part`` lacks, behind those it has."""
    done = part.stat().st_size if part.exists() else 0
    done = 0 if done > size else done
    free = shutil.disk_usage(part.parent).free
    if size - done > free:
        raise MisuseError(
            f"{address} takes {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free in {part.parent}: "
            f"give `local_dir` another disk, or set {FOLDER}"
        )
    with open(part, "r+b" if part.exists() else "w+b") as file, ThreadPoolExecutor(AT_ONCE) as pool:
        file.truncate(done)
        file.seek(done)
        for piece in _in_order(pool, read, range(done, size, PIECE)):
            file.write(piece)
            done += len(piece)
            progress(done, size)
        flush_to_disk(file)


def _in_order(pool: ThreadPoolExecutor, read: Callable[[int], bytes], starts: range) -> Iterator[bytes]:
    """The pieces in order, a few of them ahead."""
    for first in range(0, len(starts), AT_ONCE):
        yield from pool.map(read, starts[first : first + AT_ONCE])


def _check(part: Path, address: str, damaged: Callable[[Path], list[int]]) -> None:
    """FailureError, and the copy goes: it is not, byte for byte, what was packed."""
    try:
        found = damaged(part)
        problem = f"image {found[0]} is damaged" if found else None
    except MisuseError as error:
        problem = str(error).removeprefix(f"{part}: ")
    if problem:
        part.unlink()
        raise FailureError(f"the copy of {address} is not what was packed ({problem}): copy it into the bucket again")
