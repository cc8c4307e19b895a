"""The files that SOURCE names: on this machine, in a bucket, on a web server, or wherever fsspec reaches."""

import glob
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from weakref import finalize

from ...errors import MisuseError, some
from ...files import open_regular
from ...places import ADDRESS, SCHEMES, Folder, place_of, shown
from .source import LARGEST

WEB = ("http", "https")
BLOCK = 1 << 22
"""Bytes that are asked for at once of a file elsewhere that is gone through in order."""
MOST_OPEN = 256
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MACHINES_OWN = ("@eaDir", "__MACOSX", "lost+found")
"""Folders that a NAS, an archiver and a file system leave among a user's."""


class Readable(Protocol):
    """What is asked of a place (``common/places.py``) that images are read from."""

    at_once: int

    def names(self, under: str = "") -> Set[str]: ...
    def size_of(self, name: str) -> int: ...
    def read(self, name: str, largest: int = LARGEST) -> bytes: ...
    def read_part(self, name: str, start: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class Files:
    """Files below one place, by their names from there."""

    place: Readable
    names: tuple[str, ...] = ()
    is_folder: bool = False
    """Whether they are all there is below a folder that SOURCE names."""

    @property
    def folder(self) -> Path | None:
        return self.place.path if isinstance(self.place, Folder) else None

    def of(self, names: Iterable[str]) -> "Files":
        """Some of them."""
        return Files(self.place, tuple(names), self.is_folder)

    @property
    def stamp(self) -> str:
        """Sizes and times of files of this machine."""
        if not self.folder:
            return ""
        found = [(self.folder / name).stat() for name in self.names]
        return str([(status.st_size, status.st_mtime_ns) for status in found])

    def read(self, name: str) -> bytes:
        return self.place.read(name, LARGEST)

    def at(self, name: str) -> str:
        """As a user would write it."""
        return str(self.folder / name) if self.folder else f"{self.place}/{name}"

    @property
    def at_once(self) -> int:
        return 1 if self.folder else self.place.at_once

    def parts(self) -> Callable[[str, int, int], bytes]:
        """Reads so many bytes of one of the files from a position. Those of this machine are kept open where they are few:
        opening one takes longer than reading a small image."""
        if not self.folder or len(self.names) > MOST_OPEN:
            return self.place.read_part
        opened = {name: self.open(name) for name in self.names}

        def read(name: str, start: int, length: int) -> bytes:
            return os.pread(opened[name].fileno(), length, start)

        for file in opened.values():
            finalize(read, file.close)
        return read

    def open(self, name: str) -> BinaryIO:
        """To read from any position. OSError: it is not there."""
        if self.folder:
            return open_regular(self.folder / name)
        return cast(BinaryIO, io.BufferedReader(_Distant(self.place, name), BLOCK))


class _Distant(io.RawIOBase):
    """A file elsewhere, read by ranges."""

    def __init__(self, place: Readable, name: str) -> None:
        self._place, self._name, self._at = place, name, 0
        self._size = place.size_of(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._at))
        data = self._place.read_part(self._name, self._at, length) if length else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@cache
def place_at(address: str) -> Readable:
    """One for all who read there. MisuseError as ``place_of``, or of fsspec's."""
    found = ADDRESS.fullmatch(address)
    if found is None or found[1] == "file":
        return place_of(address)
    scheme, rest = found.groups()
    if scheme in (*SCHEMES, *WEB, "memory"):
        from ...bucket import bucket_at

        return bucket_at(scheme, rest.strip("/"), "nothing is written: run the same command again")
    from .filesystem import Filesystem

    return Filesystem(address if "://" in address else shown(address))


def folder_at(address: str) -> Files:
    """All files below an address, but hidden ones. MisuseError: its kind of place cannot tell."""
    if address.startswith(tuple(f"{scheme}:" for scheme in WEB)):
        raise MisuseError(
            f"{shown(address)}: what a web server has in a folder cannot be asked; give a list, a .tar or a .parquet there"
        )
    place = place_at(address)
    return Files(place, tuple(sorted(name for name in place.names() if not _is_hidden(name))), is_folder=True)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in MACHINES_OWN for part in name.split("/"))


def folder_of(path: Path) -> Files:
    """All files below a folder of this machine, in sorted order of their names, but hidden ones and those that a machine made for
    itself."""
    return Files(Folder(path), tuple(sorted(_walk(path, "", (path.resolve(),)))), is_folder=True)


def _walk(folder: Path, prefix: str, ancestors: tuple[Path, ...]) -> Iterator[str]:
    """Relative paths of the files below ``folder``. Follows links, except to a folder that it is in."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in MACHINES_OWN:
            continue
        if entry.is_dir():
            real = Path(entry.path).resolve()
            if real not in ancestors:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*ancestors, real))
        else:
            yield prefix + entry.name


def is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[") or bool(BRACES.search(name))


def files_named(source: str) -> Files:
    """The files that a path, an address or a pattern of either names: ``shards/{000..099}.tar``, ``s3://bucket/train-*.parquet``.

    MisuseError: nothing fits, or some that braces spell out are not there.
    """
    scheme, slashes, below = source.rpartition("://")
    names = sorted(set(_expanded(below)))
    base = posixpath.commonpath([posixpath.dirname(_plain_part(name)) for name in names])
    names = [name[len(base) :].lstrip("/") if base else name for name in names]
    found, missing = [], []
    if slashes:
        files = Files(place_at(f"{scheme}://{base}"))
        wild = [name for name in names if is_pattern(name)]
        there = folder_at(f"{scheme}://{base}").names if wild else ()
        found = [name for name in there if any(fits(name, pattern) for pattern in wild)]
        found += [name for name in names if name not in wild]
    else:
        files = Files(Folder(folder := Path(base or ".")))
        for name in names:
            here = glob.glob(name, root_dir=folder, recursive=True) if is_pattern(name) else [name]
            there = [file for file in here if (folder / file).exists()]
            found += [file for file in there if not (folder / file).is_dir()]
            missing += [] if there or is_pattern(name) else [name]
    if missing:
        raise MisuseError(f"{source}: {len(missing):,} of {len(names):,} files are missing: {some(missing)}")
    if not found:
        raise MisuseError(f"{source}: no file fits this pattern")
    return files.of(sorted(set(found)))


def fits(name: str, pattern: str) -> bool:
    """As `glob.glob`, recursive, finds files."""
    return _expression(pattern).fullmatch(name) is not None


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern))


def _plain_part(name: str) -> str:
    """What comes before the first sign of a pattern."""
    return re.split(r"[*?\[]", name, maxsplit=1)[0]


def _expanded(pattern: str) -> Iterator[str]:
    """``a-{0..2}.tar`` -> a-0.tar, a-1.tar, a-2.tar; ``{a,b}`` -> a, b."""
    pieces = BRACES.split(pattern)
    choices = [[piece] if number % 2 == 0 else list(_choices(piece)) for number, piece in enumerate(pieces)]
    yield from map("".join, product(*choices))


def _choices(inside: str) -> Iterator[str]:
    if span := RANGE.fullmatch(inside):
        first, last = span.groups()
        width = len(first) if first.startswith("0") and len(first) > 1 else 0
        yield from (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    else:
        yield from inside.split(",")
