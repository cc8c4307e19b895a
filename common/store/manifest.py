"""The target store's manifest: what its rows are targets of, and how they were made. The group's attributes.

Its checksum lies among the versions that wrote it, which are the part that no reader compares.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from ..errors import FailureError, MisuseError
from ..files import differences
from ..places import Place
from ..records import LARGEST, DamagedError, crc32c, parsed, typed
from .encodings import Encoding
from .patches import PatchEncoding
from .shards import LARGEST_CHUNK, ShardedArray

FORMAT_VERSION = 1
CHUNK_ROWS = 256
"""Rows a chunk, and the block of the training order (sizes compared in benchmarks/store.py)."""
SHARD_CHUNKS = 16
"""Chunks a shard file."""

LIMITS = {
    "num_images": (1, 1 << 40),
    "view_size": (1, 1 << 14),
    "dim": (1, 1 << 20),
    "num_prototypes": (0, 1 << 26),
    "chunk_rows": (1, 1 << 16),
    "shard_chunks": (1, 1 << 16),
}
"""What numbers a manifest may have: memory is taken by them."""
CHECKSUM = "crc32c"
"""Its name among the versions."""

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
    patches: dict[str, Any] | None = None  # PatchEncoding.to_dict(), where there are patch targets
    chunk_rows: int = CHUNK_ROWS
    shard_chunks: int = SHARD_CHUNKS
    format_version: int = FORMAT_VERSION

    @property
    def num_chunks(self) -> int:
        return -(-self.num_images // self.chunk_rows)

    @property
    def num_shards(self) -> int:
        return -(-self.num_chunks // self.shard_chunks)

    def chunks(self, shard: int) -> range:
        """The numbers of the chunks of a shard; the last shard may have fewer."""
        first = shard * self.shard_chunks
        return range(first, min(first + self.shard_chunks, self.num_chunks))

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        chunks = self.chunks(shard)
        return range(chunks.start * self.chunk_rows, min(chunks.stop * self.chunk_rows, self.num_images))

    def arrays(self) -> dict[str, ShardedArray]:
        """The sharded arrays by name."""
        encoding, views = Encoding.from_dict(self.encoding), len(self.view_ids)
        kinds = [(encoding, encoding.layout(self.dim, self.num_prototypes))]
        if (patches := self.patch_encoding) is not None:
            kinds.append((patches.of_one, patches.layout()))
        return {
            name: ShardedArray(
                (self.num_images, views, *shape), np.dtype(dtype), self.chunk_rows, self.shard_chunks, kind.shuffle
            )
            for kind, layout in kinds
            for name, (shape, dtype) in layout.items()
        }

    @property
    def patch_encoding(self) -> PatchEncoding | None:
        """None: there are no patch targets."""
        return None if self.patches is None else PatchEncoding.from_dict(self.patches)

    @property
    def bytes_per_view(self) -> int:
        """Of all arrays, before compression."""
        pooled = Encoding.from_dict(self.encoding).bytes_per_view(self.dim, self.num_prototypes)
        return pooled + (self.patch_encoding.bytes_per_view if self.patch_encoding else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with sorted keys: the group's attributes. The usual pooling, and patches where there are none,
        are left out, as in stores that are older than the choice.
        """
        values = {n: v for n, v in asdict(self).items() if v is not None or n not in ("pooling", "patches")}
        plain = json.loads(json.dumps(values, sort_keys=True))
        return plain | {"versions": {CHECKSUM: _checksum(plain), **plain["versions"]}}

    def differences(self, asked: "StoreManifest", *may_differ: str) -> str:
        """What of it is not as ``asked``, in words; "" where nothing is but library versions and the fields ``may_differ``."""
        ours, theirs = self.to_json(), asked.to_json()
        names = [name for name in (theirs | ours) if name not in ("versions", *may_differ)]
        return "; ".join(differing(ours, {name: theirs.get(name) for name in names}))

    @classmethod
    def from_json(cls, path: object, attributes: Any) -> Self:
        """The inverse of `to_json`. MisuseError when ``path`` is no store or of another format version, FailureError when
        it is damaged.
        """
        if (
            not isinstance(attributes, dict)
            or "format_version" not in attributes
            or "data_fingerprint" not in attributes
        ):
            raise MisuseError(f"{path} is not a target store: it is a Zarr group without rob's manifest")
        if attributes["format_version"] != FORMAT_VERSION:
            raise MisuseError(
                f"{path} has format version {attributes['format_version']}, this rob reads version {FORMAT_VERSION}: "
                "cache the targets again, or use the rob that wrote it"
            )
        try:
            found = typed(cls, attributes)
            sealed = found.versions.pop(CHECKSUM, None)  # None: of a rob from before checksums, and read as it was then
            if sealed is not None and sealed != _checksum({**attributes, "versions": found.versions}):
                raise DamagedError("is damaged or was edited: its checksum does not match")
            found._check_numbers()
        except DamagedError as problem:
            raise FailureError(f"{path} is damaged, its manifest {problem}: delete the store and {AGAIN}") from None
        return found

    def _check_numbers(self) -> None:
        """DamagedError: numbers that no store has, by which memory would be taken."""
        for name, (low, high) in LIMITS.items():
            if not low <= vars(self)[name] <= high:
                raise DamagedError(f"says {name} is {vars(self)[name]}, which it cannot be")
        try:
            arrays = self.arrays().values()
        except (MisuseError, TypeError, ValueError) as error:
            raise DamagedError(f"says of its encoding what cannot be ({error})") from None
        if any(array.chunk_bytes > LARGEST_CHUNK for array in arrays):
            raise DamagedError("says a chunk is larger than any can be")


def _checksum(attributes: Mapping[str, Any]) -> str:
    """Of attributes as `to_json` has them, less the checksum itself."""
    return crc32c(json.dumps(attributes, sort_keys=True).encode())


def differing(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """A phrase for each value of the manifest fields ``asked`` that a store has otherwise; both as `to_json` has them."""
    if "weights_hash" in asked:  # said first, the pooling explains the hash
        asked = {"pooling": asked.get("pooling"), **asked}
    found = differences({name: stored.get(name) for name in asked}, dict(asked))
    return [f"{name} is {_short(old)} in the store, not {_short(new)}" for name, old, new in found]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-30:]}"


def read_json(store: Place, name: str) -> dict[str, Any]:
    """The object in the file ``name`` of a store. FailureError when it is cut or otherwise damaged."""
    try:
        return parsed(store.read(name, LARGEST))
    except DamagedError:
        raise FailureError(f"{store} is damaged, its {name} is cut or no JSON: delete the store and {AGAIN}") from None
