"""Nearest neighbours among cached targets: what the teacher finds alike."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..store.codec import decode
from ..store.reader import TargetStore


class Neighbours(NamedTuple):
    """Of Q images with V views each the n nearest views, nearest first, each of another image: (Q, V, n) arrays."""

    image_ids: np.ndarray
    columns: np.ndarray
    """The neighbour's column of the store."""
    cosines: np.ndarray


def nearest(store: TargetStore, image_ids: np.ndarray, columns: int, chunks: Iterable[int], count: int) -> Neighbours:
    """The ``count`` nearest neighbours of the first ``columns`` views of ``image_ids`` (Q,), among the rows of ``chunks``.

    A neighbour is an image, by the view of it that is nearest. Alike is the cosine of what is stored: embeddings, logits,
    or the kept logits with zeros for the others. Where there are fewer other images than ``count``, cosines are -inf.
    """
    store = store.pooled()
    manifest, rows = store.manifest, store.manifest.chunk_rows
    decoded = decode(store.encoding, store.rows(image_ids))
    queries = unit_vectors(
        {name: values[:, :columns] for name, values in decoded.items()}, manifest.num_prototypes
    ).flatten(0, 1)
    own = torch.from_numpy(np.repeat(image_ids, columns))
    best = [
        torch.full((len(queries), count), -torch.inf),
        *(torch.zeros(len(queries), count, dtype=torch.int64) for _ in "ab"),
    ]
    for chunk in chunks:
        start, stop = chunk * rows, min((chunk + 1) * rows, manifest.num_images)
        cosines, nearest_column = _cosines(queries, decode(store.encoding, store.read(start, stop))).max(2)
        ids = torch.arange(start, stop).expand_as(cosines)
        cosines = cosines.masked_fill(ids == own[:, None], -torch.inf)
        merged = [torch.cat(pair, dim=1) for pair in zip(best, (cosines, ids, nearest_column), strict=True)]
        places = merged[0].topk(count, dim=1).indices
        best = [values.gather(1, places) for values in merged]
    cosines, ids, nearest_column = (values.unflatten(0, (len(image_ids), columns)).numpy() for values in best)
    return Neighbours(ids, nearest_column, cosines)


def unit_vectors(decoded: dict[str, Tensor], num_prototypes: int) -> Tensor:
    """Unit vectors (..., D or K) of decoded targets."""
    if "ids" in decoded:
        logits = decoded["logits"]
        values = logits.new_zeros(*logits.shape[:-1], num_prototypes).scatter_(-1, decoded["ids"], logits)
    else:
        (values,) = decoded.values()
    return F.normalize(values, dim=-1)


def _cosines(queries: Tensor, decoded: dict[str, Tensor]) -> Tensor:
    """(Q, R, V) cosines of unit ``queries`` (Q, D or K) with the decoded targets of R rows; sparse ones are never made dense."""
    if "ids" not in decoded:
        return torch.einsum("qd,rvd->qrv", queries, unit_vectors(decoded, 0))
    ids, logits = decoded["ids"], F.normalize(decoded["logits"], dim=-1)
    return torch.stack([(query[ids] * logits).sum(-1) for query in queries])
