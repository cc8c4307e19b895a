"""The target store's manifest: what its rows are targets of, and how they were made. The group's attributes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import FailureError, MisuseError
from ..files import differences
from .encodings import Encoding
from .shards import ShardedArray

FORMAT_VERSION = 1
CHUNK_ROWS = 256
"""Rows a chunk, and the block of the training order (sizes compared in benchmarks/store.py)."""
SHARD_CHUNKS = 16
"""Chunks a shard file."""

AGAIN = "run rob cache-teacher again"
"""What to do about a store that is not whole."""


@dataclass(frozen=True)
class StoreManifest:
    """What the targets are targets of, and how they were made: what a reader must know or refuse."""

    data_fingerprint: str
    num_images: int
    recipe: dict[str, Any]
    seed: int
    view_ids: tuple[int, ...]
    view_size: int
    teacher: str
    weights_hash: str
    head: str
    dim: int
    num_prototypes: int  # 0: none (yet)
    teacher_temp: float | None
    encoding: dict[str, Any]  # Encoding.to_dict()
    precision: str
    geometry: str  # the resize path that made the views' pixels
    versions: dict[str, str]
    pooling: str | None = None  # what of the teacher's tokens was taken, where it is not what its network pools itself
    chunk_rows: int = CHUNK_ROWS
    shard_chunks: int = SHARD_CHUNKS
    format_version: int = FORMAT_VERSION

    @property
    def num_chunks(self) -> int:
        return -(-self.num_images // self.chunk_rows)

    def arrays(self) -> dict[str, ShardedArray]:
        """The sharded arrays by name."""
        encoding, views = Encoding.from_dict(self.encoding), len(self.view_ids)
        return {
            name: ShardedArray(
                (self.num_images, views, *shape), np.dtype(dtype), self.chunk_rows, self.shard_chunks, encoding.shuffle
            )
            for name, (shape, dtype) in encoding.layout(self.dim, self.num_prototypes).items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with sorted keys: the group's attributes. The usual pooling is left out, as in stores that are
        older than the choice.
        """
        values = {name: value for name, value in asdict(self).items() if (name, value) != ("pooling", None)}
        return json.loads(json.dumps(values, sort_keys=True))

    @classmethod
    def from_json(cls, path: Path, attributes: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. MisuseError when ``path`` is no store or of another format version, FailureError when
        a field is missing.
        """
        if "format_version" not in attributes or "data_fingerprint" not in attributes:
            raise MisuseError(f"{path} is not a target store: it is a Zarr group without rob's manifest")
        if attributes["format_version"] != FORMAT_VERSION:
            raise MisuseError(
                f"{path} has format version {attributes['format_version']}, this rob reads version {FORMAT_VERSION}: "
                "cache the targets again, or use the rob that wrote it"
            )
        attributes = {"pooling": None, **attributes}
        missing = ", ".join(field.name for field in fields(cls) if field.name not in attributes)
        if missing:
            raise FailureError(f"{path} is damaged, its manifest lacks {missing}: delete the store and {AGAIN}")
        known: dict[str, Any] = {field.name: attributes[field.name] for field in fields(cls)}
        known["view_ids"] = tuple(known["view_ids"])
        return cls(**known)


def differing(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """A phrase for each value of the manifest fields ``asked`` that a store has otherwise; both as `to_json` has them."""
    if (
        "weights_hash" in asked
    ):  # of the whole manifest, which leaves the usual pooling out: said first, it explains the hash
        asked = {"pooling": asked.get("pooling"), **asked}
    found = differences({name: stored.get(name) for name in asked}, dict(asked))
    return [f"{name} is {_short(old)} in the store, not {_short(new)}" for name, old, new in found]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-30:]}"


def read_json(store: Path, name: str) -> dict[str, Any]:
    """The object in the file ``name`` of a store. FailureError when it is cut or otherwise damaged."""
    try:
        content = json.loads((store / name).read_text())
    except ValueError:  # no JSON, or not even text
        content = None
    if not isinstance(content, dict):
        raise FailureError(f"{store} is damaged, its {name} is cut or no JSON: delete the store and {AGAIN}")
    return content
