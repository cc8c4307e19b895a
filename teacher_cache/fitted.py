"""A store of embeddings with prototypes fitted to it, and the store of logits that both give."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.errors import MisuseError
from ..common.files import locked
from ..common.run import float64
from ..common.store.codec import decode, encode
from ..common.store.encodings import PATCHES, Encoding
from ..common.store.manifest import StoreManifest
from ..common.store.reader import TargetStore, add_prototypes
from .prototypes import CPU, PrototypeConfig, fit_prototypes
from .share import ALONE, WAIT, Share

STEPS = 1 << 30
"""A unit's, of what embeddings are rounded to in their sum."""


def with_prototypes(
    path: Path,
    config: PrototypeConfig,
    note: Callable[[str], None],
    device: torch.device = CPU,
    progress: Callable[[int, int], None] = lambda done, total: None,
    share: Share = ALONE,
) -> TargetStore:
    """The complete store of embeddings at ``path`` with prototypes, which are fitted to it, on ``device``, unless it has them
    already.

    ``progress`` is called with (batches done, all). Of workers that ``share`` the store one fits them, and the others wait; in a
    bucket that is the first rank, and parts that end at the same time each do. MisuseError: it has another number of them, or
    another process is fitting some and this one is alone.
    """
    while (store := TargetStore.open(path)).manifest.num_prototypes != config.num:
        taken = f"{store.place}: another rob cache-teacher fits prototypes to it; wait for it to finish"
        if store.place.has_locks:
            with locked(path / ".lock", taken, wait=share.split is not None):
                _fit(TargetStore.open(path), config, note, device, progress)
        elif share.helps and share.part and not store.manifest.num_prototypes:
            time.sleep(WAIT)
        else:
            _fit(store, config, note, device, progress)
    return store


def _fit(
    store: TargetStore,
    config: PrototypeConfig,
    note: Callable[[str], None],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    if store.manifest.num_prototypes == config.num:
        return  # by the process that held the lock until now
    if store.manifest.num_prototypes:
        raise MisuseError(
            f"{store.place} has {store.manifest.num_prototypes} fitted prototypes already, `prototypes` asks for "
            f"{config.num}: give another path to cache to"
        )

    pooled = store.pooled()

    def read(start: int, stop: int) -> Tensor:
        return decode(store.encoding, pooled.read(start, stop))["embedding"]

    note(f"fitting {config.num} prototypes on the cached embeddings")
    with ThreadPoolExecutor(store.place.at_once) as pool:
        fitted = fit_prototypes(read, store.manifest.num_images, config, device, progress, pool.map)
    note(
        f"{fitted.used:.1%} of the prototypes are used, balance {fitted.balance:.2f} of 1, mean cosine {fitted.cohesion:.2f}; "
        f"teacher temperature {fitted.teacher_temp:.3g}"
    )
    if TargetStore.open(store.path).manifest.num_prototypes != config.num:  # else others fitted the same meanwhile
        add_prototypes(store.path, fitted.prototypes.numpy(), "fitted", fitted.teacher_temp, store.statistics)


def statistics_of(embedding: Tensor, logits: Tensor | None) -> dict[str, np.ndarray]:
    """Of a chunk, wherever it is: what the store adds up of embeddings (rows, V, D), and of logits (rows, V, K) if any.

    Sums of multiples of 1e-9 are exact in float64 up to 8 million: the same in any order, also of what a store grows by.
    """
    multiples = (float64(embedding) * STEPS).round()
    statistics = {"embedding_sum": (multiples.sum((0, 1)) / STEPS).cpu().numpy()}
    if logits is not None:
        usage = torch.bincount(logits.argmax(-1).flatten(), minlength=logits.shape[-1])
        statistics["usage"] = usage.cpu().numpy()
    return statistics


def write_logits(
    source: TargetStore,
    out: Path,
    manifest: StoreManifest,
    rows: Callable[[int, int], None],
    device: torch.device = CPU,
    share: Share = ALONE,
) -> None:
    """Turn the embeddings and prototypes of ``source`` into the store of logits ``out``, chunk by chunk, on ``device``, this
    worker's ``share``; ``rows`` is called with (rows done by all, all)."""
    assert source.prototypes is not None
    prototypes, encoding = torch.from_numpy(source.prototypes).to(device), Encoding.from_dict(manifest.encoding)
    if (writer := share.join(out, manifest)) is None:
        return
    for shards in share.runs(writer):
        for shard in shards:
            while (start := writer.claim(shard)) is not None:
                stop = min(start + writer.manifest.chunk_rows, manifest.num_images)
                stored = source.read(start, stop)
                embedding = decode(source.encoding, stored)["embedding"].to(device)
                logits = embedding @ prototypes.T
                of_patches = {name: values for name, values in stored.items() if name.startswith(PATCHES)}
                writer.append(encode(encoding, embedding, logits) | of_patches, statistics_of(embedding, logits))
                rows(writer.rows_done, manifest.num_images)
    of_patches = {name: values for name, values in source.statistics.items() if name.startswith("patch_")}
    writer.finish(source.prototypes, of_patches)
