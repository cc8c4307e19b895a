"""A list of images: a text, CSV or JSONL file with a path a line, and a label where there is one.

Paths are relative to the list's folder, absolute, or addresses. In a text file the label follows the path behind a tab, or behind
its image ending (``n01440764/1.JPEG 0``); in the others columns have names, or the first is the path and the second the label.
"""

import csv
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import MisuseError, some
from ...files import read_regular
from ...places import is_address
from ..config import PackConfig
from ..reading import endings
from .files import WEB, Files, place_at
from .source import LARGEST, Source, numbered

ENDINGS = (".txt", ".lst", ".list", ".csv", ".tsv", ".jsonl", ".ndjson")
PATH_COLUMNS = ("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image", "img", "url")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "cls", "fine_label")
SHOWN = 20
"""Missing files that are named."""
Row = tuple[str, str | int | None]


def open_list(files: Files, config: PackConfig) -> Source:
    """The images of one list, in sorted order of their paths. MisuseError: it cannot be understood, or files are missing, unless
    ``skip_bad`` leaves them out."""
    name, *others = files.names
    if others:
        raise MisuseError(f"{config.source}: {1 + len(others)} lists; give one, joined: cat A B > both")
    rows = list(_rows(files, name, config))
    if not rows:
        raise MisuseError(f"{files.at(name)}: an empty list; write the path of an image on each line")
    labels, classes = numbered([label for _, label in rows])
    known: dict[str, int] = {}
    for (path, _), label in zip(rows, labels, strict=True):
        if known.setdefault(path, label) != label:
            raise MisuseError(f"{files.at(name)}: {path} is on several lines, with different labels; keep one of them")
    paths = tuple(sorted(known))
    missing = _missing(files, paths)
    if missing and not config.skip_bad:
        raise MisuseError(
            f"{files.at(name)}: {len(missing):,} of its {len(paths):,} images are missing: {some(missing, SHOWN)}; paths are "
            f"relative to {files.place}; put it right, or set `skip_bad` to leave them out"
        )
    again = len(rows) - len(paths)
    left_out = (f"{again:,} lines of {files.at(name)} name an image again",) if again else ()

    def read(path: str) -> tuple[bytes, int]:
        if files.folder and not is_address(path):
            return read_regular(os.path.join(files.folder, path), LARGEST), known[path]
        if not is_address(path) and ".." not in path:
            return files.read(posixpath.normpath(path)), known[path]
        place, below = _place_of(files, path)
        return place_at(place).read(below, LARGEST), known[path]

    distant = any(map(is_address, paths)) or files.folder is None
    return Source(paths, read, classes, left_out, files.folder, str(files.place), files.stamp, 16 if distant else 1)


def _place_of(files: Files, path: str) -> tuple[str, str]:
    """The bucket or server of an image, and its name there."""
    address = path if is_address(path) else f"{files.place}/{path}"
    scheme, _, rest = address.partition("://")
    root, _, below = rest.partition("/")
    return f"{scheme}://{root}", posixpath.normpath(below)


def _missing(files: Files, paths: Sequence[str]) -> list[str]:
    """Of those that can be asked about at once: on this machine, or below the list's own address in a bucket."""
    if files.folder:
        return [path for path in paths if not is_address(path) and not os.path.exists(files.folder / path)]
    if str(files.place).startswith(WEB):
        return []
    there = files.place.names()
    return [
        path for path in paths if not is_address(path) and ".." not in path and posixpath.normpath(path) not in there
    ]


def _rows(files: Files, name: str, config: PackConfig) -> Iterator[Row]:
    where, ending = files.at(name), Path(name).suffix.lower()
    try:
        text = files.read(name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MisuseError(f"{where}: not a text file in UTF-8; write the path of an image on each line") from None
    lines = re.split(r"\r\n|\r|\n", text)  # JSON and names of files may hold what else splitlines() takes for one
    if ending in (".jsonl", ".ndjson"):
        yield from _of_objects(lines, where, config)
    elif ending in (".csv", ".tsv"):
        try:
            rows = list(csv.reader(lines, "excel-tab" if ending == ".tsv" else "excel"))
        except csv.Error as error:
            raise MisuseError(f"{where}: no table ({error}); look for a quote that is never closed") from None
        yield from _of_columns(rows, where, config)
    else:
        yield from (_of_line(line) for line in lines if line.strip() and not line.startswith("#"))


def _of_line(line: str) -> Row:
    path, tab, label = line.strip().partition("\t")
    if not tab and not path.lower().endswith(endings()):
        first, _, last = path.rpartition(" ")
        if first.rstrip().lower().endswith(endings()):
            path, label = first.rstrip(), last
    return path, label.strip() or None


def _of_columns(rows: list[list[str]], where: str, config: PackConfig) -> Iterator[Row]:
    rows = [row for row in rows if any(row)]
    names = [name.strip() for name in rows[0]] if rows else []
    header = config.image_column or config.label_column or {name.lower() for name in names} & set(PATH_COLUMNS)
    if not header:
        yield from ((row[0], row[1] if len(row) > 1 else None) for row in rows)
        return
    image = column(names, config.image_column, PATH_COLUMNS, where, "image_column")
    label = column(names, config.label_column, LABEL_COLUMNS, where, "label_column", needed=False)
    at, labels_at = names.index(image), names.index(label) if label else -1
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise MisuseError(f"{where}: row {number} has {len(row)} fields, the first {len(names)}; put it right")
        yield row[at], row[labels_at] if label else None


def _of_objects(lines: list[str], where: str, config: PackConfig) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, str):
            yield found, None
            continue
        if not isinstance(found, dict):
            raise MisuseError(f'{where}: line {number} is no JSON object, such as {{"path": "a.jpg", "label": "cat"}}')
        image = column(list(found), config.image_column, PATH_COLUMNS, f"{where}, line {number}", "image_column")
        label = column(list(found), config.label_column, LABEL_COLUMNS, where, "label_column", needed=False)
        if not isinstance(found[image], str):
            raise MisuseError(f"{where}: line {number} has no path in {image!r}, but {found[image]!r}")
        yield found[image], found[label] if label else None


def column(
    names: Sequence[str], asked: str | None, usual: Sequence[str], where: str, option: str, needed: bool = True
) -> str:
    """The column that was asked for, else the first usual one; "" where there is none and none is needed. MisuseError."""
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), "") if asked is None else asked * (asked in names)
    if not found and (needed or asked is not None):
        what = "no column of images" if asked is None else f"no column {asked!r}"
        raise MisuseError(f"{where}: {what} among {some(list(names), SHOWN)}; name one with `{option}`")
    return found
