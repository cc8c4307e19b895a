"""What is in a ``.beton`` or a target store, as lines for a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from ..errors import MisuseError
from ..images.beton import JPEG, Beton
from ..places import Place, is_address, local_path, place_of, shown
from ..store.begun import half_written, rows_done, shards_done
from ..store.encodings import Encoding
from ..store.manifest import AGAIN, StoreManifest
from ..store.patches import PatchEncoding
from ..store.reader import TargetStore
from ..tokens import TOKENS

Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Inspection:
    """``title`` and ``rows`` (name, value) of a table; ``kind`` is packed images, target store or half-written target store."""

    path: Path
    kind: str
    rows: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        return f"{shown(self.path)}: {self.kind}"


def inspect(path: Path) -> Inspection:
    """Read the manifest, and what little of the file it takes.

    Raises MisuseError for anything else than a ``.beton`` or a target store.
    """
    path = local_path(path)
    if not is_address(path) and not path.exists():
        raise MisuseError(f"there is nothing at {path}: give a .beton (rob pack) or a target store (rob cache-teacher)")
    if path.suffix == ".beton" if is_address(path) else not path.is_dir():
        return Inspection(path, "packed images", tuple(_data_rows(Beton(path))))
    place = place_of(path)
    if not place.exists("zarr.json") and (begun := half_written(place)):
        return Inspection(path, "half-written target store", tuple(_half_written_rows(place, begun)))
    if not is_address(path) and not place.exists("zarr.json"):
        raise MisuseError(
            f"{path} is not a target store: give one, or a .beton; of a run, rob report shows what there is"
        )
    return Inspection(path, "target store", tuple(_store_rows(TargetStore.open(path))))


def _data_rows(data: Beton) -> Rows:
    manifest = data.manifest
    yield "images", f"{manifest.num_images:,}"
    yield (
        "size on disk",
        f"{decimal(manifest.size_bytes)}, {decimal(manifest.size_bytes // manifest.num_images)} an image",
    )
    quality = f", quality {manifest.jpeg_quality} where encoded anew" if manifest.jpeg_quality else ""
    stored = int((data.modes == JPEG).sum())
    mixed = "" if stored in (0, manifest.num_images) else f" ({stored:,} of them JPEG)"
    yield "stored as", f"{'raw pixels' if manifest.encoding == 'raw' else 'JPEG'}{quality}{mixed}"
    yield "width x height", f"{_range(data.widths)} x {_range(data.heights)} px"
    if manifest.max_resolution:
        yield "longest side", f"at most {manifest.max_resolution} px"
    if data.labels is None:
        yield "labels", "none"
    else:
        labels, counts = np.unique(data.labels[data.labels >= 0], return_counts=True)
        yield "classes", f"{len(labels)}: {_abbreviated(manifest.classes or labels.tolist())}"
        yield "images a class", _range(counts)
        if unlabelled := int((data.labels < 0).sum()):
            yield "without a label", f"{unlabelled:,}"
    yield "paths", _abbreviated(manifest.paths, ends=1)
    for images, _ in manifest.grown:
        yield "appended", f"rows from {images:,} on"
    if manifest.skipped:
        yield "skipped", f"{len(manifest.skipped):,} broken: {_abbreviated(manifest.skipped)}"
    yield "fingerprint", _short(manifest.fingerprint)
    yield "format version", str(manifest.format_version)


def _half_written_rows(place: Place, manifest: StoreManifest) -> Rows:
    done = rows_done(place, manifest)
    yield "done", f"{done:,} of {manifest.num_images:,} images ({done / manifest.num_images:.0%}): {AGAIN} to go on"
    if manifest.num_shards > 1:
        yield "whole shards", f"{_runs(shards_done(place, manifest))} of 0 to {manifest.num_shards - 1}"
    yield from _manifest_rows(manifest)


def _store_rows(store: TargetStore) -> Rows:
    manifest = store.manifest
    yield from _manifest_rows(manifest)
    views = manifest.num_images * len(manifest.view_ids)
    in_memory = views * manifest.bytes_per_view
    targets = sum(store.place.size(name) for name in store.arrays)
    yield "targets on disk", f"{decimal(targets)}, {targets / views:,.0f} bytes a view ({targets / in_memory:.0%})"
    yield "store on disk", decimal(store.place.size())
    if "usage" in store.statistics:
        usage = store.statistics["usage"]
        yield (
            "prototypes used",
            f"{(usage > 0).mean():.1%} are the nearest of a view, one of them of {usage.max() / views:.1%}",
        )


def _manifest_rows(manifest: StoreManifest) -> Rows:
    recipe, encoding = manifest.recipe, Encoding.from_dict(manifest.encoding)
    views = len(manifest.view_ids)
    yield "images x views", f"{manifest.num_images:,} x {views}"
    yield "teacher", f"{manifest.teacher}, weights {_short(manifest.weights_hash)}, {manifest.precision}"
    pooled = f", {TOKENS[manifest.pooling]}" if manifest.pooling else ""
    yield "embedding", f"{manifest.dim} dimensions, head: {manifest.head}{pooled}"
    if manifest.num_prototypes:
        yield "prototypes", f"{manifest.num_prototypes:,}, teacher temperature {manifest.teacher_temp or 'not known'}"
    else:
        yield "prototypes", "none"
    a_view, patches = manifest.bytes_per_view, manifest.patch_encoding
    yield "encoding", _describe(encoding, manifest.num_prototypes)
    if patches is not None:
        yield "patches", f"{_describe_patches(patches)}, {patches.bytes_per_view:,} bytes a view"
    yield "bytes a view", f"{a_view:,} in memory, {decimal(manifest.num_images * views * a_view)} in all"
    yield "recipe", f"{recipe['name']}, seed {manifest.seed}, {manifest.view_size} px, {manifest.geometry} geometry"
    yield "chunks", f"{manifest.num_chunks:,} of {manifest.chunk_rows} images, {manifest.shard_chunks} to a shard"
    yield "data fingerprint", _short(manifest.data_fingerprint)
    yield "written by", ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    yield "format version", str(manifest.format_version)


def _describe(encoding: Encoding, num_prototypes: int) -> str:
    match encoding.kind:
        case "embedding":
            return f"embedding, {encoding.dtype}"
        case "topk":
            temps = ", ".join(f"{temp:g}" for temp in encoding.temps)
            return f"topk, {min(encoding.k, num_prototypes)} of {num_prototypes:,} logits, tail at temperatures {temps}"
        case _:
            return f"dense, {num_prototypes:,} logits"


def _describe_patches(patches: PatchEncoding) -> str:
    positions = f"{patches.grid} x {patches.grid}"
    match patches.kind:
        case "grid":
            cut = (
                f"{patches.dim} principal components of {patches.width}"
                if patches.reduced
                else f"{patches.dim} numbers"
            )
            return f"grid, {positions} tokens of {cut}, int8"
        case "embedding":
            return f"embedding, {positions} of {patches.dim} numbers, int8, for {patches.num_prototypes:,} prototypes"
        case _:
            return f"prototypes, {positions} of {patches.k} of {patches.num_prototypes:,} logits"


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers, those that follow each other as one: 0 to 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return _abbreviated([" to ".join(map(str, run)) for run in runs]) or "none"


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _abbreviated(values: Sequence[object], ends: int = 5) -> str:
    """All values, or the first and last few of many."""
    names = [str(value) for value in values]
    if len(names) <= 2 * ends + 2:
        return ", ".join(names)
    return ", ".join([*names[:ends], "...", *names[-ends:]])


def _short(digest: str) -> str:
    """Enough of a sha256 to tell two apart by eye."""
    return digest[:16]
