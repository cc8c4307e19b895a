"""From images to whole chunks of the teacher's targets."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..common.errors import FailureError
from ..common.store.manifest import StoreManifest
from ..common.views.loader import Batch, ViewLoader, ViewSet


@contextmanager
def after(made: torch.Event | None, *tensors: Tensor | None) -> Iterator[None]:
    """On CUDA, the block runs in a stream of its own that waits for ``made`` alone. In the teacher's stream, reading a result
    would wait for all the work that was queued since, and the GPU would then be idle until the next chunk."""
    if made is None:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_event(made)
    with torch.cuda.stream(stream):
        yield
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)


def refuse_not_finite(embedding: Tensor, first_row: int) -> None:
    """FailureError naming the images, ``first_row`` onwards, whose embeddings (rows, V, D) are NaN or infinite."""
    image_ids = (first_row + (~embedding.isfinite()).flatten(1).any(1).nonzero().flatten()).tolist()
    if image_ids:
        named = ", ".join(map(str, image_ids[:5])) + (" ..." if len(image_ids) > 5 else "")
        raise FailureError(
            f"the teacher's output for {len(image_ids)} of {len(embedding)} images is NaN or infinite (image ids {named}): "
            "check its weights, its `precision` and these images"
        )


@dataclass(frozen=True)
class Chunk:
    """The teacher's targets of the last rows of the chunk that begins at ``row``, usually of all its rows: embeddings
    (rows, V, D), logits (rows, V, K) if it has prototypes, both on its device, and the arrays of patch targets, if any. None:
    the chunk is copied, and the teacher does not see it.
    """

    row: int
    embedding: Tensor | None = None
    logits: Tensor | None = None
    patches: Mapping[str, np.ndarray] = field(default_factory=dict)

    def last(self, rows: int) -> Self:
        """Without all but the last ``rows`` rows."""
        if self.embedding is None:
            return self
        first = len(self.embedding) - rows
        logits = None if self.logits is None else self.logits[first:]
        patches = {name: values[first:] for name, values in self.patches.items()}
        return replace(self, embedding=self.embedding[first:], logits=logits, patches=patches)


def chunks(
    loader: ViewLoader,
    rows: np.ndarray,
    run_teacher: Callable[[Batch], tuple[Tensor, dict[str, np.ndarray]]],
    manifest: StoreManifest,
    views: tuple[int, ...],
    logits_of: Callable[[Tensor], Tensor] | None,
) -> Generator[Chunk]:
    """The targets of ``views`` of ``rows``, chunk by chunk. ``rows`` are the ends of chunks, in any order.

    Batches never straddle chunks, so a resumed run computes the very batches that an uninterrupted one does.
    """
    parts: list[Tensor] = []
    of_patches: list[dict[str, np.ndarray]] = []
    for batch in loader.epoch(rows, [ViewSet(views, manifest.view_size)]):
        embedded, arrays = run_teacher(batch)
        parts.append(embedded)
        of_patches.append(arrays)
        last = int(batch.image_ids[-1])
        if (last + 1) % manifest.chunk_rows == 0 or last == manifest.num_images - 1:
            embedding = torch.cat(parts)
            joined = {name: np.concatenate([arrays[name] for arrays in of_patches]) for name in arrays}
            parts, of_patches = [], []
            logits = None if logits_of is None else logits_of(embedding)
            yield Chunk(last // manifest.chunk_rows * manifest.chunk_rows, embedding, logits, joined)


def fitting_batch(asked: int, chunk_rows: int) -> int:
    """The largest that is asked for and divides a chunk."""
    return max(size for size in range(1, min(asked, chunk_rows) + 1) if chunk_rows % size == 0)
