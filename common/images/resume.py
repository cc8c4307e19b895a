"""A pack that was broken off goes on: beside its temporary file are the rows that are in it, written now and then.

Only a pack of many images leaves that. The next one to the same file, of the same images with the same settings, has them copied,
each checked, instead of reading and encoding them; any other one removes them. Their own files are not looked at again.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from ..files import lock
from .beton import ALLOCATION, ROW, BetonWriter, StoredImage, checksum
from .config import PackConfig
from .sources import Source

EVERY = 10_000
"""Images after which the rows are written: half a minute of photographs, and a kill costs no more than that."""
RECORD = np.dtype([("row", ROW), ("allocation", ALLOCATION), ("place", "<u8")])
ROWS = ".rows"
"""Ending of the file beside the temporary one."""
KEY = 64
"""Letters at the beginning, which say what is packed."""


def key_of(config: PackConfig, source: Source) -> str:
    """Of all that an image's bytes and its row depend on, but the images themselves."""
    settings = [
        config.source,
        config.max_resolution,
        config.jpeg_quality,
        config.raw,
        config.window,
        config.percentiles,
        config.image_column,
        config.label_column,
    ]
    digest = hashlib.sha256(json.dumps([PIL.__version__, *settings, source.classes, source.stamp]).encode())
    for path in source.paths:
        digest.update(path.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


class Journal:
    """The rows of a writer, each with the place of its image among the source's. A block that ends in an error, other than the
    disk's, or by Ctrl-C, leaves the temporary file to the next pack where it is worth it; one that ends well, nothing."""

    def __init__(
        self, writer: BetonWriter, key: str, before: "PartialPack | None", note: Callable[[str], None]
    ) -> None:
        self._writer, self._key, self._before, self._note = writer, key, before, note
        self._places: list[int] = []
        self._written = 0

    def add(self, place: int) -> None:
        """The writer's last row."""
        self._places.append(place)
        if len(self._places) % EVERY == 0:
            self._write()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        before = 0 if self._before is None else len(self._before.records)
        if kind is None and self._before is not None:
            remove(self._before.path)
        elif kind is not None and not issubclass(kind, OSError) and self._written and len(self._places) > before:
            self._write()
            _rename(self._writer.temporary, _partial(self._writer.path))
            self._note(f"{self._written:,} images are kept: the same command goes on from there")
        _beside(self._writer.temporary, ROWS).unlink(missing_ok=True)

    def _write(self) -> None:
        rows, allocations = self._writer.written(self._written)
        records = np.zeros(len(rows), RECORD)
        records["row"], records["allocation"] = rows, allocations
        records["place"] = self._places[self._written :]
        with _beside(self._writer.temporary, ROWS).open("ab" if self._written else "wb") as file:
            file.write((b"" if self._written else self._key.encode()) + records.tobytes())
        self._written = len(self._places)


@dataclass(frozen=True)
class PartialPack:
    """What an earlier pack of the same images with the same settings left: a ``.beton`` without its end, and its ``records``."""

    path: Path
    records: np.ndarray

    @classmethod
    def of(cls, out: Path, key: str) -> "PartialPack | None":
        """The one with the most images, moved away from the names that a writer clears; None: there is none."""
        found = [partial for path in _left(out) if (partial := _read(path, key)) is not None]
        best = max(found, key=lambda partial: len(partial.records), default=None)
        if best is None or best.path != _partial(out):
            remove(_partial(out))
        if best is None or best.path == _partial(out):
            return best
        _rename(best.path, _partial(out))
        return cls(_partial(out), best.records)

    def images(self) -> Iterator[tuple[int, StoredImage, int]]:
        """Place in the source, image and label of each row, up to the first that is not what was written."""
        with self.path.open("rb") as file:
            for record in self.records:
                row, size = record["row"], int(record["allocation"]["size"])
                file.seek(int(row["pointer"]))
                image = StoredImage(file.read(size), int(row["height"]), int(row["width"]), int(row["mode"]))
                if len(image.data) != size or checksum(image) != row["checksum"].tolist():
                    return
                yield int(record["place"]), image, int(row["label"])


def remove(path: Path) -> None:
    for ending in (ROWS, ""):
        _beside(path, ending).unlink(missing_ok=True)


def _rename(path: Path, to: Path) -> None:
    """With its rows, which come last: alone they are of nothing."""
    for ending in ("", ROWS):
        _beside(path, ending).replace(_beside(to, ending))


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.half")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _left(out: Path) -> list[Path]:
    killed = out.parent.glob(f".{glob.escape(out.name)}.tmp-*{ROWS}")
    renamed = _beside(_partial(out), ROWS)
    return [path.with_name(path.name.removesuffix(ROWS)) for path in (*killed, renamed) if path.exists()]


def _read(path: Path, key: str) -> PartialPack | None:
    """None: of other images, or another process is at it."""
    if not path.exists():
        return None
    with path.open("r+b") as file:
        if not lock(file.fileno()):
            return None
    data = _beside(path, ROWS).read_bytes()
    whole = (len(data) - KEY) // RECORD.itemsize
    if whole < 1 or data[:KEY] != key.encode():
        return None
    return PartialPack(path, np.frombuffer(data, RECORD, whole, KEY))
