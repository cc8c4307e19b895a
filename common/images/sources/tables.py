"""Parquet files, and Hugging Face data sets of Parquet or Arrow files: a column of images, as bytes or as paths.

A table keeps its rows in compressed groups, and images are packed in an order of their own: out of order, each would cost the
decompression of a group. So the images of a file are copied, once and in its order, to a temporary file without a name beside the
packed one, which goes with this process; from there each is read by itself.
"""

import errno
import json
import os
import posixpath
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from sys import intern
from tempfile import TemporaryFile
from threading import Lock
from typing import Any, BinaryIO, cast
from weakref import finalize

from ...errors import FailureError, MisuseError, first_line, not_installed, some
from ...files import is_inside
from ..config import ALL_PARTS, USUAL_PART, PackConfig
from ..reading import BadImage
from .files import Files
from .lists import LABEL_COLUMNS, PATH_COLUMNS, column
from .source import Source, item_names, numbered

ENDINGS = (".parquet", ".arrow")
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", *PATH_COLUMNS)
ROWS = 64
"""That are copied at once: 64 MB of photographs."""
PART_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""Word in a file's name -> the part of the data set that it holds."""


@dataclass
class _Table:
    """One file: how many rows, and once they are copied, where the bytes of each row's image are. A size below 0: of its path."""

    name: str
    count: int
    starts: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    lock: Lock = field(default_factory=Lock)


def open_tables(files: Files, config: PackConfig) -> Source:
    """The images of Parquet or Arrow files, in order of ``FILE/ROW``. MisuseError: there is no column of images, no such part of
    a data set, or a file is none of its kind."""
    _need_pyarrow(files)
    names = _of_part(files, config)
    first = files.at(names[0])
    with _Reader(files, names[0]) as reader:
        schema = reader.schema
    image = _image_column(schema, config, first)
    label = column(schema.names, config.label_column, LABEL_COLUMNS, first, "label_column", needed=False)

    tables, labels = [], []
    for name in names:
        with _Reader(files, name) as reader:
            if image not in reader.schema.names:
                raise MisuseError(
                    f"{files.at(name)}: no column {image!r}, which {first} has; give files of one data set"
                )
            found = reader.column(label) if label in reader.schema.names else None
            tables.append(_Table(name, reader.count))
            labels += [None] * reader.count if found is None else found
    numbers, classes = numbered(labels)
    names_known = _class_names(schema, label)
    if classes is None and names_known and max(numbers, default=-1) < len(names_known):
        classes = names_known
    paths = tuple(path for table in tables for path in item_names(table.name, table.count))
    if not paths:
        raise MisuseError(f"{first}: a table without rows")
    where = {path: number for number, path in enumerate(paths)}
    firsts = list(accumulate((table.count for table in tables), initial=0))
    label_of = array("q", numbers)
    copies = _Copies(config.out.parent)

    def read(path: str) -> tuple[bytes, int]:
        number = bisect_right(firsts, where[path]) - 1
        table, row = tables[number], where[path] - firsts[number]
        with table.lock:
            if not table.starts and table.count:
                copies.add(table, lambda: _images(files, table.name, image))
        return _image(files, copies.read(table, row), table.sizes[row]), label_of[where[path]]

    return Source(paths, read, classes, (), files.folder, str(files.place), files.stamp, files.at_once)


def _image(files: Files, data: bytes, size: int) -> bytes:
    if size >= 0:
        return data
    path = posixpath.normpath(data.decode(errors="surrogateescape"))
    if not is_inside(path):
        raise BadImage(f"the table has neither bytes nor a path below {files.place} for it, but {path!r}")
    return files.read(path)


class _Copies:
    """The temporary file, made when it is needed. Threads write to it side by side."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._end, self._lock = folder, 0, Lock()

    @cached_property
    def _file(self) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = cast(BinaryIO, TemporaryFile(dir=self._folder, buffering=0))  # noqa: SIM115
        finalize(self, file.close)
        return file

    def add(self, table: _Table, batches: Callable[[], Iterator[list[tuple[bytes, bool]]]]) -> None:
        """The images of a table, each with whether it is but a path. FailureError: there is no room."""
        starts, sizes = array("q"), array("q")
        for batch in batches():
            joined = b"".join(data for data, _ in batch)
            with self._lock:
                descriptor = self._file.fileno()
                at, self._end = self._end, self._end + len(joined)
            try:
                if os.pwrite(descriptor, joined, at) < len(joined):  # what is left of a disk that is nearly full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise FailureError(
                    f"no room in {self._folder} for a copy of the images of {table.name}, which lies there until they are packed "
                    f"({error.strerror})"
                ) from None
            for data, is_path in batch:
                starts.append(at)
                sizes.append(-len(data) if is_path else len(data))
                at += len(data)
        table.sizes, table.starts = sizes, starts

    def read(self, table: _Table, row: int) -> bytes:
        if row >= len(table.starts):
            raise BadImage("the table has become shorter")
        return os.pread(self._file.fileno(), abs(table.sizes[row]), table.starts[row])


class _Reader:
    """A Parquet or an Arrow file, in batches of rows. MisuseError: it is neither."""

    def __init__(self, files: Files, name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._where = files.at(name)
        self._file = files.open(name)
        self._parquet: Any = None
        try:
            if name.lower().endswith(".parquet"):
                self._parquet = pq.ParquetFile(self._file, buffer_size=1 << 20, pre_buffer=False)
                self.schema, self.count = self._parquet.schema_arrow, self._parquet.metadata.num_rows
            else:
                is_file = self._file.read(6) == b"ARROW1"
                self._file.seek(0)
                self._arrow: Any = pa.ipc.open_file(self._file) if is_file else pa.ipc.open_stream(self._file)
                self.schema = self._arrow.schema
                self.count = sum(batch.num_rows for batch in self._batches())
        except (pa.ArrowInvalid, OSError) as error:
            self._file.close()
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> MisuseError:
        kind = "a Parquet file" if self._parquet or self._where.lower().endswith(".parquet") else "an Arrow file"
        return MisuseError(f"{self._where}: not {kind}, or cut ({first_line(error).rstrip('.')}); copy it again")

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _batches(self) -> Iterator[Any]:
        if hasattr(self._arrow, "num_record_batches"):
            yield from map(self._arrow.get_batch, range(self._arrow.num_record_batches))
        else:
            import pyarrow as pa

            self._file.seek(0)
            yield from pa.ipc.open_stream(self._file)

    def batches(self, name: str) -> Iterator[Any]:
        """Arrays of one column."""
        import pyarrow as pa

        try:
            if self._parquet is not None:
                for batch in self._parquet.iter_batches(ROWS, columns=[name], use_threads=False):
                    yield batch.column(0)
            else:
                for batch in self._batches():
                    whole = batch.column(name)
                    yield from (whole.slice(start, ROWS) for start in range(0, len(whole), ROWS))
        except (pa.ArrowInvalid, OSError) as error:
            raise self._broken(error) from None

    def column(self, name: str) -> list[str | None]:
        """As words, of which there are few."""
        values = (value for batch in self.batches(name) for value in batch.to_pylist())
        return [None if value is None else intern(str(value)) for value in values]


def _images(files: Files, name: str, image: str) -> Iterator[list[tuple[bytes, bool]]]:
    """Of each row the bytes of its image, or the path to it, and whether that is what it is."""
    with _Reader(files, name) as reader:
        for batch in reader.batches(image):
            yield [_bytes_or_path(value) for value in batch.to_pylist()]


def _bytes_or_path(value: Any) -> tuple[bytes, bool]:
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        return value.encode(errors="surrogateescape"), True
    return value or b"", False


def _image_column(schema: Any, config: PackConfig, where: str) -> str:
    """Of bytes, of paths, or of both, as Hugging Face's are."""
    import pyarrow.types as types

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            return {"bytes", "path"} & {kind.field(place).name for place in range(kind.num_fields)} != set()
        return (
            types.is_binary(kind) or types.is_large_binary(kind) or types.is_string(kind) or types.is_large_string(kind)
        )

    fit = {name: schema.field(name).type for name in schema.names if is_image(schema.field(name).type)}
    if config.image_column is None:
        for name, kind in fit.items():
            if types.is_struct(kind) or (types.is_binary(kind) and len(fit) == 1):
                return name
    elif config.image_column in schema.names and config.image_column not in fit:
        kind = schema.field(config.image_column).type
        raise MisuseError(
            f"{where}: column {config.image_column!r} holds {kind}, and neither bytes nor paths of images"
        )
    if config.image_column is None and not set(IMAGE_COLUMNS) & {name.lower() for name in fit}:
        raise MisuseError(
            f"{where}: no column of images; its columns are {some(schema.names, 20)}; name one with `image_column`"
        )
    return column(list(fit), config.image_column, IMAGE_COLUMNS, where, "image_column")


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Of a Hugging Face data set, which are in its schema."""
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(map(str, said))
    except (KeyError, TypeError, ValueError):
        return None


def _of_part(files: Files, config: PackConfig) -> tuple[str, ...]:
    """The files of the `split` that is asked for, by what their names say; of files that were named all, where none was."""
    names = tuple(name for name in files.names if name.lower().endswith(ENDINGS))
    asked = config.split != USUAL_PART
    if config.split == ALL_PARTS or not (files.is_folder or asked):
        return names
    words = {name: re.split(r"[^a-z]+", name.lower()) for name in names}
    parts = {name: next((PART_OF[word] for word in words[name] if word in PART_OF), None) for name in names}
    there, wanted = sorted({part for part in parts.values() if part}), PART_OF.get(config.split, config.split)
    if asked and not there:
        raise MisuseError(f"{files.place}: no file's name says that it is of `split` {config.split}: leave `split` out")
    if there and wanted not in there:
        raise MisuseError(
            f"{files.place} has {', '.join(there)} and no {config.split}: set `split` to one of these, or {ALL_PARTS}"
        )
    return tuple(name for name in names if parts[name] == wanted) if there else names


def _need_pyarrow(files: Files) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise not_installed(f"{files.at(files.names[0])}:", "pyarrow", "parquet") from None
