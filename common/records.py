"""The one way in which files of ours are read: as JSON that carries a checksum of its own text and is of a stated form.

A record is a JSON object whose last value, ``crc32c``, is the checksum of all bytes before it, so that any tool still reads it
and a flipped byte, a cut or an edit does not pass. What it says is then held against a type: a dataclass, a TypedDict, or what
these are made of. Files of other kinds (``.beton``, safetensors, torch's archives, Zarr) use the checksum and the types alone.
"""

import json
import re
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import google_crc32c
import numpy as np

from .errors import FailureError, MisuseError
from .files import read_regular

T = TypeVar("T")

LARGEST = 64 << 20
"""Bytes of a record, but for those that say otherwise: more is none of ours, and would fill the memory."""

_SEAL = re.compile(rb',?\s*"crc32c": "([0-9a-f]{8})"\s*\}\s*\Z')


class DamagedError(ValueError):
    """What is wrong with a content, in words that follow the name of its file: "is cut or no JSON"."""


class NoChecksumError(DamagedError):
    """There is no telling whether it is damaged."""


def crc32c(*parts: Any) -> str:
    """Castagnoli's checksum, 8 hex digits, of bytes-like ``parts`` one behind another. It finds every flipped bit and run of up
    to 32, and all but 1 in 4e9 of other damage; against a forger it is no help."""
    value = 0
    for part in parts:
        if len(part):  # NumPy's arrays are what it takes besides bytes
            value = google_crc32c.extend(value, part if isinstance(part, bytes) else np.frombuffer(part, np.uint8))
    return f"{value:08x}"


def sealed(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A JSON object with its checksum, and a newline."""
    end = ", " if indent is None else ",\n" + " " * indent
    body = json.dumps(content, indent=indent, default=str).encode()[:-1].rstrip()
    close = b"}\n" if indent is None else b"\n}\n"
    return body + f'{end if content else ""}"crc32c": "{crc32c(body)}"'.encode() + close


def unsealed(data: bytes, kind: type[T], unchecked: bool = False) -> T:
    """What ``sealed`` gave, as a ``kind``. DamagedError: its checksum is another, it has none, or is of another form.

    ``unchecked``: one that never had a checksum is accepted; the caller compares its content with something that has one.
    """
    seal = _SEAL.search(data[-80:])
    if seal is None:
        content = parsed(data)  # the plainer reason, where there is one
        if not any("crc" in name or "32c" in name for name in content):  # of a flipped bit in the name one half is left
            if unchecked:
                return typed(kind, content)
            raise NoChecksumError("has no checksum: it was edited, or is of a rob from before checksums")
    if seal is None or crc32c(data[: len(data) - min(80, len(data)) + seal.start()]) != seal[1].decode():
        raise DamagedError("is damaged or was edited: its checksum does not match")
    content = parsed(data)
    content.pop("crc32c")
    return typed(kind, content)


def read_record(path: Path, kind: type[T], remedy: str, largest: int = LARGEST, unchecked: bool = False) -> T:
    """The record at ``path``. FileNotFoundError; FailureError, which ends with ``remedy``: it is no such record."""
    try:
        return unsealed(read_regular(path, largest), kind, unchecked)
    except DamagedError as problem:
        raise FailureError(f"{path} {problem}: {remedy}") from None


def read_foreign(path: Path, kind: type[T], what: str, largest: int) -> T:
    """JSON of others, which has no checksum. MisuseError: it cannot be read, or is not ``what`` it should be, by its form."""
    try:
        return typed(kind, parsed(read_regular(path, largest)))
    except DamagedError as problem:
        raise MisuseError(f"{path} is not {what}: it {problem}") from None
    except OSError as error:
        raise MisuseError(f"{path} cannot be read: {error.strerror}") from None


def parsed(data: bytes) -> dict[str, Any]:
    """A JSON object. DamagedError: it is none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedError("is cut or no JSON") from None
    if not isinstance(content, dict):
        raise DamagedError("is cut or no JSON object")
    return content


# ==== types ====


def typed(kind: Any, value: Any, name: str = "") -> Any:
    """A JSON value as a ``kind``: lists become tuples where one is wanted, objects dataclasses. ``bool`` is no ``int``.

    DamagedError names the first place that is of another type. Unknown fields are refused in a dataclass, which is built from
    all of them, and left alone in a TypedDict.
    """
    if kind is Any or (type(value) is kind and kind not in (dict, list)):
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return typed(arguments[0], value, name)
    if origin in (Union, types.UnionType):
        several = [one for one in arguments if one is not type(None)]
        if value is None and len(several) < len(arguments):
            return None
        for one in several[:-1]:
            with suppress(DamagedError):
                return typed(one, value, name)
        return typed(several[-1], value, name)
    if origin is Literal:
        if value in arguments:
            return value
    elif is_dataclass(kind) or is_typeddict(kind):
        return _object(kind, value, name)
    elif origin in (tuple, list):
        if isinstance(value, list):
            return _sequence(origin, arguments, value, name)
    elif origin in (dict, Mapping):
        if isinstance(value, dict):
            return {key: typed(arguments[1], one, f"{name}.{key}") for key, one in value.items()}
    elif kind is float:
        if type(value) is int and abs(value) < 1 << 1000:
            return float(value)
    elif type(value) is (type(None) if kind is None else kind):
        return value
    raise _wrong(name, value)


_hints = cache(get_type_hints)


def _object(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(name, value)
    hints = _hints(kind)
    if is_dataclass(kind):
        optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
        unknown = value.keys() - hints.keys()
        if unknown:
            raise DamagedError(f"says {_short(min(unknown))}, which is nothing here")
    else:
        optional = kind.__optional_keys__
    inside = f"{name.removeprefix('.')}." if name else ""
    missing = [inside + field for field in hints if field not in value and field not in optional]
    if missing:
        raise DamagedError(f"lacks {', '.join(missing)}")
    found = {field: typed(hints[field], one, f"{name}.{field}") for field, one in value.items() if field in hints}
    return kind(**found) if is_dataclass(kind) else {**value, **found}  # type: ignore[operator]


def _sequence(origin: Any, arguments: tuple[Any, ...], values: list[Any], name: str) -> Any:
    one = arguments[0]
    if origin is tuple and Ellipsis not in arguments:
        if len(values) != len(arguments):
            raise _wrong(name, values)
        return tuple(
            typed(kind, value, f"{name}.{at}") for at, (kind, value) in enumerate(zip(arguments, values, strict=True))
        )
    if set(map(type, values)) <= {one}:  # of a million names, at once
        return origin(values)
    return origin(typed(one, value, f"{name}.{at}") for at, value in enumerate(values))


def _wrong(name: str, value: Any) -> DamagedError:
    return DamagedError(f"says {name.removeprefix('.') or 'all'} is {_short(value)}, which it cannot be")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]} ..."
