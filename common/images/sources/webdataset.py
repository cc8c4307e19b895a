"""WebDataset's tars, and any other tar of images: indexed once, then each image is read from where it lies in it.

Files of one sample share their path up to the first dot: ``0001.jpg`` has the label of ``0001.cls``. Without ``.cls`` files the
folders in the tar are classes, as those of a folder are.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import BinaryIO

from ...errors import MisuseError, some
from ..config import PackConfig
from ..reading import BadImage, endings
from .files import Files
from .folder import by_folder, label_by_folder
from .source import Source, numbered

BLOCK = 512
"""Bytes that everything in a tar is a multiple of."""
LABEL = ".cls"
LONGEST_LABEL = 1 << 10
"""Bytes."""


@dataclass
class _Shard:
    """The images of one tar. ``cut``: why the rest of it cannot be read."""

    names: list[str] = field(default_factory=list)
    starts: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    labels: dict[str, str] = field(default_factory=dict)
    """Sample -> what its ``.cls`` says."""
    cut: str | None = None


def open_tars(files: Files, config: PackConfig) -> Source:
    """The images of tars, in sorted order of ``TAR/PATH``. MisuseError: a tar is cut, unless ``skip_bad`` takes what it has."""
    with ThreadPoolExecutor(files.at_once) as pool:
        shards = list(pool.map(lambda name: _index(files, name), files.names))
    cut = [f"{files.at(name)}: {shard.cut}" for name, shard in zip(files.names, shards, strict=True) if shard.cut]
    if cut and not config.skip_bad:
        raise MisuseError(f"{some(cut)}; copy it again, or set `skip_bad` to take the images before that")
    left_out = tuple(f"left out what comes behind the damage of {sentence}" for sentence in cut)

    firsts = list(accumulate((len(shard.names) for shard in shards), initial=0))
    where = {
        f"{name}/{member}": first + row
        for name, first, shard in zip(files.names, firsts, shards, strict=False)
        for row, member in enumerate(shard.names)
    }  # of two members of one name the later one counts, as for tar

    def place(path: str) -> tuple[int, int]:
        """Its tar, and its row there."""
        number = bisect_right(firsts, where[path]) - 1
        return number, where[path] - firsts[number]

    def member(path: str) -> str:
        number, row = place(path)
        return shards[number].names[row]

    paths = tuple(sorted(where))
    if not paths:
        raise MisuseError(f"{files.at(some(files.names))}: no image in it; looked for {' '.join(endings())}")
    classes: tuple[str, ...] | None = None
    labels = [-1] * len(paths)
    if any(shard.labels for shard in shards):
        labels, classes = numbered([shards[place(path)[0]].labels.get(_key(member(path))) for path in paths])
    elif not config.recursive:
        kept, classes, beside = by_folder(tuple(sorted(set(map(member, paths)))), config.source)
        left_out += beside
        if beside:
            inside = set(kept)
            paths = tuple(path for path in paths if member(path) in inside)
        of_member = label_by_folder(classes)
        labels = [of_member(member(path)) for path in paths]
    label_of = array("q", bytes(8 * firsts[-1]))
    for path, label in zip(paths, labels, strict=True):
        label_of[where[path]] = label
    read_part = files.parts()

    def read(path: str) -> tuple[bytes, int]:
        number, row = place(path)
        shard = shards[number]
        data = read_part(files.names[number], shard.starts[row], shard.sizes[row])
        if len(data) != shard.sizes[row]:
            raise BadImage("the tar has become shorter")
        return data, label_of[where[path]]

    return Source(paths, read, classes, left_out, files.folder, str(files.place), files.stamp, files.at_once)


def _key(name: str) -> str:
    """WebDataset's: the path up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _index(files: Files, name: str) -> _Shard:
    shard, known = _Shard(), endings()
    with files.open(name) as file:
        try:
            for member, start, size in members(file):
                last = member.rpartition("/")[2].lower()
                if last.startswith("."):
                    continue
                if last.endswith(known):
                    shard.names.append(member)
                    shard.starts.append(start)
                    shard.sizes.append(size)
                elif last.endswith(LABEL) and size <= LONGEST_LABEL:
                    file.seek(start)
                    shard.labels[_key(member)] = file.read(size).decode(errors="replace").strip()
        except _CutError as problem:
            if not shard.names and problem.at == 0:
                raise MisuseError(f"{files.at(name)}: not a tar; give one that is, not compressed") from None
            shard.cut = str(problem)
    return shard


class _CutError(Exception):
    def __init__(self, at: int, last: str) -> None:
        super().__init__(f"cut or damaged at byte {at:,}, {f'behind {last}' if last else 'at its beginning'}")
        self.at = at


def members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each regular file of a tar (POSIX's ustar and pax, GNU's), in order.

    Beside ``tarfile`` it does a fifth of the work, which is what 100,000 small images want, keeps nothing, and says that a tar
    is cut where it is cut between two members, too.
    """
    at, long_name, long_size, last = 0, "", None, ""
    end = file.seek(0, 2)
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _CutError(at, last)
        if not any(header):
            return
        try:
            size = _number(header[124:136])
            if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
                raise ValueError
        except ValueError:
            raise _CutError(at, last) from None
        kind, start = header[156:157], at + BLOCK
        if kind in b"0\0" and long_size is not None:
            size = long_size
        at = start + -(-size // BLOCK) * BLOCK
        if start + size > end:
            raise _CutError(start, last)
        if kind in (b"L", b"x"):  # what follows has a long name, or one that is no ASCII
            text = file.read(size)
            if kind == b"L":
                long_name = text.rstrip(b"\0").decode(errors="surrogateescape")
            else:
                said = dict(_pax(text))
                long_name = said.get("path", long_name)
                long_size = int(said["size"]) if "size" in said else None
            continue
        if kind in (b"0", b"\0"):
            name = long_name or _name(header)
            last = name.removeprefix("./")
            if not name.endswith("/"):  # so old tars mark a folder
                yield last, start, size
        if kind not in (b"g", b"K"):
            long_name, long_size = "", None


def _number(text: bytes) -> int:
    """Octal, or where that is too small GNU's base 256. ValueError: it is neither."""
    if text[0] in (0x80, 0xFF):
        return int.from_bytes(text[1:], "big")
    return int(text.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="surrogateescape")


def _pax(text: bytes) -> Iterator[tuple[str, str]]:
    """Records ``LENGTH KEY=VALUE\\n``."""
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            return
        record, text = text[: int(length)], text[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        yield key.decode(errors="replace"), value.decode(errors="surrogateescape")
