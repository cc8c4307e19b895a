"""Where a target store lies: a folder, or below an address in a bucket (``s3://``, ``gs://``, ``az://``). Files have names alike.

An address goes through the settings as a Path does, which has one slash less: ``s3:/bucket/targets.zarr``.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Protocol

from .errors import MisuseError
from .files import LARGEST_FILE, open_locked, open_regular, read_regular, whole_file

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
SCHEMES = ("s3", "gs", "az")


class Place(Protocol):
    """Files by name, ``/``-separated below the place. FileNotFoundError where one is read that is not there."""

    at_once: int
    """Parts that are worth reading side by side."""
    has_locks: bool
    """Whether processes can hold something there, and so small files are worth while."""

    def exists(self, name: str) -> bool: ...
    def names(self, under: str = "") -> Set[str]:
        """Of the files below ``under``, from there; none where there is no such thing."""
        ...

    def size(self, under: str = "") -> int:
        """Bytes of the files below."""
        ...

    def size_of(self, name: str) -> int: ...
    def missing(self, names: Iterable[str]) -> str | None:
        """The first of them that is not there."""
        ...

    def read(self, name: str, largest: int = LARGEST_FILE) -> bytes: ...
    def read_part(self, name: str, start: int, length: int) -> bytes:
        """Fewer bytes where the file ends before."""
        ...

    def read_end(self, name: str, length: int) -> bytes: ...
    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all, instead of what is there."""
        ...

    def remove(self, name: str) -> None:
        """Which may be gone already."""
        ...

    def remove_all(self, under: str = "") -> None:
        """The files below ``under``; in a bucket a manifest at its top last."""
        ...

    def copy_from(self, other: "Place", name: str) -> None:
        """The file of that name of another place, whole or not at all."""
        ...

    def holds_other(self, known: Set[str]) -> bool:
        """Whether there is a file, or something below, that is not ``known``."""
        ...

    def lock(self, name: str, shared: bool = False) -> int | None:
        """A descriptor whose closing, or the death of this process, lets others lock the file ``name``; None: another process
        holds it. FileNotFoundError: its folder is not there. Where nobody can hold anything, as if nobody else were there."""
        ...


class Folder:
    """A folder of this machine, or of a file system that it sees."""

    at_once, has_locks = 2, True

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def names(self, under: str = "") -> Set[str]:
        root = str(self.path / under)
        walked = ((folder[len(root) + 1 :], files) for folder, _, files in os.walk(root))
        return {os.path.join(folder, file) for folder, files in walked for file in files}

    def size(self, under: str = "") -> int:
        return sum(file.stat().st_size for file in (self.path / under).rglob("*") if file.is_file())

    def size_of(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def missing(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if not self.exists(name)), None)

    def read(self, name: str, largest: int = LARGEST_FILE) -> bytes:
        return read_regular(os.path.join(self.path, name), largest)  # joining Paths takes as long as opening a file

    def read_part(self, name: str, start: int, length: int) -> bytes:
        with open(self.path / name, "rb", buffering=0) as file:
            if start + length > os.fstat(file.fileno()).st_size:
                return b""
            file.seek(start)
            return file.read(length)

    def read_end(self, name: str, length: int) -> bytes:
        with open_regular(self.path / name) as file:
            file.seek(-length, os.SEEK_END)
            return file.read(length)

    def write(self, name: str, data: bytes) -> None:
        """While the store is begun the temporary file is this process's own, and goes with pending/."""
        begun = (self.path / "pending").exists()
        own = f"pending/.part-{socket.gethostname()}-{os.getpid()}" if begun or name.startswith("pending/") else ".part"
        with whole_file(self.path / name, self.path / own) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove_all(self, under: str = "") -> None:
        shutil.rmtree(self.path / under, ignore_errors=True)

    def copy_from(self, other: Place, name: str) -> None:
        self.write(name, other.read(name))

    def holds_other(self, known: Set[str]) -> bool:
        path = self.path
        return path.exists() and (not path.is_dir() or bool({entry.name for entry in path.iterdir()} - known))

    def lock(self, name: str, shared: bool = False) -> int | None:
        return open_locked(self.path / name, shared)


def place_of(path: Path | str) -> Place:
    """MisuseError: an address of a kind that is not read, one that holds a password, or a package is missing."""
    found = ADDRESS.fullmatch(str(path))
    if found is None:
        return Folder(Path(path))
    scheme, rest = found.groups()
    if scheme == "file":
        return Folder(Path(f"/{rest}"))
    if scheme != "memory" and scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise MisuseError(f"{scheme}:// is no address of a store: give a path, or {known} or file://")
    from .bucket import bucket_at

    return bucket_at(scheme, rest.strip("/"))


def is_address(path: Path | str) -> bool:
    """Whether it is no path of this machine."""
    found = ADDRESS.fullmatch(str(path))
    return found is not None and found[1] != "file"


def local_path(path: Path | str) -> Path:
    """The same path; of ``file://`` the one that it stands for."""
    found = ADDRESS.fullmatch(str(path))
    return Path(f"/{found[2]}") if found is not None and found[1] == "file" else Path(path)


def hidden_beside(path: Path, kind: str) -> Path:
    """Where something of a ``kind`` lies while what is at ``path`` is made of it. MisuseError: an address of a bucket alone."""
    if is_address(path) and len(path.parts) < 3:
        raise MisuseError(f"{shown(path)} names a bucket: write {shown(path)}/NAME, which leaves room for others")
    return path.with_name(f".{path.name}.{kind}")


def shown(path: Path | str) -> str:
    """A path as its user wrote it: an address with both its slashes."""
    found = ADDRESS.fullmatch(str(path))
    return str(path) if found is None else f"{found[1]}://{'/' if found[1] == 'file' else ''}{found[2]}"
