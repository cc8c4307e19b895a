"""Small target stores: a manifest, what a teacher would give, and a writer's way through it."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from rob.common.store.codec import decode, encode
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter

VIEWS, DIM, PROTOTYPES = 3, 16, 40
ENCODINGS = [
    Encoding("embedding", "float32"),
    Encoding("embedding", "int8"),
    Encoding("topk", k=8),
    Encoding("dense"),
]


def manifest_of(encoding: Encoding, num_images: int = 70, num_prototypes: int = PROTOTYPES, **changes) -> StoreManifest:
    """Chunks of 8 rows in shards of 3: 70 images are two whole shards and one with two whole chunks and a short one."""
    manifest = StoreManifest(
        data_fingerprint="ab12",
        num_images=num_images,
        recipe={"name": "dino", "global_scale": [0.14, 1.0]},
        seed=3,
        view_ids=tuple(range(VIEWS)),
        view_size=32,
        teacher="tiny",
        weights_hash="cd34",
        head="none",
        dim=DIM,
        num_prototypes=num_prototypes,
        teacher_temp=0.04,
        encoding=encoding.to_dict(),
        precision="fp32",
        geometry="ffcv",
        versions={"torch": "2"},
        chunk_rows=8,
        shard_chunks=3,
    )
    return replace(manifest, **changes)


def chunk_of(manifest: StoreManifest, start: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a teacher would give for the chunk at ``start``: any function of the rows' numbers."""
    return _encoded(Encoding.from_dict(manifest.encoding), start, min(start + manifest.chunk_rows, manifest.num_images))


@lru_cache
def _encoded(encoding: Encoding, start: int, stop: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    embedding = torch.randn(stop, VIEWS, DIM, generator=torch.Generator().manual_seed(7))[start:]
    embedding = torch.nn.functional.normalize(embedding, dim=-1)
    arrays = encode(encoding, embedding, embedding @ prototypes().T)
    return arrays, {"embedding_sum": embedding.double().sum((0, 1)).numpy(), "rows": np.array(stop - start)}


@lru_cache
def prototypes() -> torch.Tensor:
    return torch.randn(PROTOTYPES, DIM, generator=torch.Generator().manual_seed(99))


def write(path: Path, manifest: StoreManifest, stop: int | None = None) -> StoreWriter:
    """Start or go on with a store, up to row ``stop`` or to the end."""
    writer = StoreWriter.open_or_resume(path, manifest)
    while writer.rows_done < (manifest.num_images if stop is None else stop):
        writer.append(*chunk_of(manifest, writer.rows_done))
    if stop is None:
        writer.finish(prototypes().numpy() if manifest.num_prototypes else None)
    return writer


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def expected_rows(manifest: StoreManifest) -> dict[str, np.ndarray]:
    chunks = [chunk_of(manifest, start)[0] for start in range(0, manifest.num_images, manifest.chunk_rows)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def reencoded(store: TargetStore, out: Path, encoding: Encoding, chunk_rows: int = 7) -> TargetStore:
    """The targets of an embedding ``store`` as another ``encoding``, in smaller chunks."""
    writer = StoreWriter.open_or_resume(
        out, replace(store.manifest, encoding=encoding.to_dict(), chunk_rows=chunk_rows)
    )
    while (start := writer.rows_done) < store.manifest.num_images:
        rows = store.read(start, min(start + chunk_rows, store.manifest.num_images))
        embedding = decode(store.encoding, rows)["embedding"]
        writer.append(encode(encoding, embedding, embedding @ torch.from_numpy(store.prototypes).T))
    writer.finish(store.prototypes, store.statistics)
    return TargetStore.open(out)
