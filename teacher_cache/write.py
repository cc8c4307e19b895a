"""Make and write a store's missing shards: the plan, the teacher over the images, and what is added when all shards are there."""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import torch
from torch import Tensor

from ..common.places import shown
from ..common.run import use_device
from ..common.store.codec import encode
from ..common.store.encodings import Encoding
from ..common.store.writer import StoreWriter
from ..common.teacher import dense_embedder, embedder
from ..common.views.loader import Batch, ViewLoader, ViewSet
from .asked import OF_FITTED, is_complete, refuse_what_is_in_the_way
from .chunks import Chunk, after, chunks, fitting_batch, refuse_not_finite
from .cost import TRIAL_VIEWS, CachePlan, free_bytes, refuse_what_will_not_fit, views_per_second
from .fitted import statistics_of
from .job import Arrays, StoreJob, Work
from .patches import fixed_arrays, with_patches
from .share import Share

Embed = Callable[..., Tensor]
"""From a batch, and how many of its images at once, to embeddings (B, V, D)."""
Dense = Callable[..., tuple[Tensor, Tensor]]
"""The same, to embeddings and maps (B, V, C, h, w)."""
Targets = tuple[Arrays, Arrays, int]
"""Of a chunk: the arrays to store, its statistics, and how many views have an embedding of zeros."""
RunTeacher = Callable[[Batch], tuple[Tensor, dict[str, np.ndarray]]]
"""From a batch to the teacher's embeddings (B, V, D), and the arrays of patch targets, if any."""


def write_store(work: Work, job: StoreJob) -> bool:
    """Make what is missing of ``job``'s store, this worker's share of it, and finish it once all is there.

    False: this worker's share is done, and the store is not whole yet.
    """
    config, progress, manifest = work.config, work.progress, job.manifest
    if is_complete(job.path, manifest, *OF_FITTED):
        if job.note is None:
            progress.note(f"{shown(job.path)} is complete already: nothing to do")
        return True
    refuse_what_is_in_the_way(job.path, manifest, work.share)  # before the teacher runs
    if job.note is not None:
        progress.note(f"{shown(config.out)}: {job.note}")
    sizes, views = job.bytes_per_view(work), work.data.num_images * config.views
    refuse_what_will_not_fit(config.out, {path: views * size for path, size in sizes.items()})

    embed, dense = _embedders(work, job)
    speed = _trial_speed(work, job, embed)  # before anything is begun: the teacher may not take views of this size
    if (writer := work.share.join(job.path, manifest)) is None:
        return True
    batch_size = fitting_batch(config.loader.batch_size, manifest.chunk_rows)
    run_teacher, of_patches = _teacher_run(work, job, writer, embed, dense, batch_size)
    if batch_size != config.loader.batch_size:
        progress.note(
            f"batches of {batch_size} images, not {config.loader.batch_size}: "
            f"a batch size must divide the {manifest.chunk_rows} images of a chunk"
        )
    progress.plan(_plan(work, job, writer, list(sizes.values()), speed))
    progress.rows(writer.rows_done, work.data.num_images)

    dead = _write_chunks(work, job, writer, run_teacher, batch_size)
    if dead:
        progress.note(
            f"{dead:,} {'view has' if dead == 1 else 'views have'} an all-zero embedding, from which a student learns nothing: "
            f"a `view_size` above {manifest.view_size} leaves the teacher more to see"
        )
    if missing := writer.missing():
        at = f"{len(missing):,} of {manifest.num_shards:,} shards"
        progress.note(
            f"{shown(job.path)}: this part is done; {at} are missing, and whoever makes the last of them finishes the store"
        )
        return False
    job.finish(writer, work.teacher, of_patches)
    return True


def _embedders(work: Work, job: StoreJob) -> tuple[Embed, Dense | None]:
    """From a batch to the teacher's embeddings; where the store is to have patches, also to its maps beside them."""
    seen = work.teacher, work.config.recipe, job.manifest.view_size, work.device, work.config.precision
    if job.manifest.patch_encoding is None:
        return embedder(*seen), None
    dense = dense_embedder(*seen)
    return lambda batch, at_once=None: dense(batch, at_once)[0], dense


def _trial_speed(work: Work, job: StoreJob, embed: Embed) -> float:
    """Views a second, of a few batches."""
    work.progress.say("trying the teacher on a few views, for the plan")
    few = min(work.config.loader.batch_size, max(1, TRIAL_VIEWS // len(job.new_views)))
    return views_per_second(
        embed, _loader(work, few), few, ViewSet(job.new_views, job.manifest.view_size), work.data.num_images
    )


def _loader(work: Work, batch_size: int) -> ViewLoader:
    config = work.config
    return ViewLoader(work.data, config.recipe, config.seed, replace(config.loader, batch_size=batch_size))


def _teacher_run(
    work: Work, job: StoreJob, writer: StoreWriter, embed: Embed, dense: Dense | None, batch_size: int
) -> tuple[RunTeacher, Mapping[str, np.ndarray]]:
    """From a batch to its targets, and what the store keeps of patches besides their rows."""
    patches = job.manifest.patch_encoding
    if patches is None or dense is None:
        return lambda batch: (embed(batch, batch_size), {}), {}
    of_the_first = work.config, work.data, work.teacher, job.manifest.view_size, dense, work.progress.note
    of_patches = job.of_patches(writer, partial(fixed_arrays, patches, *of_the_first))
    return with_patches(patches, work.teacher, partial(dense, at_once=batch_size), of_patches, work.device), of_patches


def _plan(work: Work, job: StoreJob, writer: StoreWriter, sizes: list[int], speed: float) -> CachePlan:
    manifest, done = job.manifest, writer.rows_done
    rows_done = done if job.views_there else max(done, job.rows_there)
    own, *beside = sizes
    encoding = Encoding.from_dict(manifest.encoding)
    smaller, of = encoding.smaller, (manifest.dim, manifest.num_prototypes)
    return CachePlan(
        num_images=work.data.num_images,
        views=len(manifest.view_ids),
        bytes_per_view=own,
        temporary_bytes_per_view=sum(beside),
        patch_bytes_per_view=0 if manifest.patch_encoding is None else manifest.patch_encoding.bytes_per_view,
        free_bytes=free_bytes(work.config.out),
        rows_done=rows_done,
        views_per_second=speed,
        rows_to_do=_rows_to_do(work.share, job, writer, work.data.num_images - rows_done),
        views_done=job.views_there,
        batch_size=fitting_batch(work.config.loader.batch_size, manifest.chunk_rows),
        smaller=smaller,
        spared_bytes_per_view=0 if smaller is None else encoding.bytes_per_view(*of) - smaller.bytes_per_view(*of),
    )


def _rows_to_do(share: Share, job: StoreJob, writer: StoreWriter, left: int) -> int:
    """Of the ``left`` rows those of the worker that has most of them, or of this one where it leaves the others': shards are not
    divided."""
    shards = [shard for shard in writer.missing() if job.views_there or job.manifest.rows(shard).stop > job.rows_there]
    most = ceil(len(shards) / share.parts) if share.helps else len(share.own(shards))
    return min(left, most * len(job.manifest.rows(0)))


def _write_chunks(work: Work, job: StoreJob, writer: StoreWriter, run_teacher: RunTeacher, batch_size: int) -> int:
    """Decode, run the teacher and write side by side: the loader is batches ahead, and a chunk is written while the next is
    computed. Returns the number of views with an embedding of zeros.
    """
    manifest, device, dead = job.manifest, work.device, 0
    encoding = Encoding.from_dict(manifest.encoding)
    loader, logits_of = _loader(work, batch_size), job.logits_of(work.teacher)

    def targets_of(batch: Batch) -> tuple[Tensor, dict[str, np.ndarray]]:
        made = run_teacher(batch)
        work.progress.seen(len(batch.image_ids))
        return made

    def chunks_of(rows: np.ndarray) -> Generator[Chunk]:
        yield from map(Chunk, job.chunks_to_copy(rows))
        seen = job.rows_to_run(rows, batch_size)
        with closing(chunks(loader, seen, targets_of, manifest, job.new_views, logits_of)) as several:
            yield from several

    def encoded(chunk: Chunk, made: torch.Event | None) -> Targets:
        """Encoded where the chunk is, so that only what is stored is copied from a GPU."""
        chunk = chunk.last(new := job.new_rows(chunk.row))
        embedding, logits = chunk.embedding, chunk.logits
        if embedding is None:
            return {}, job.zero_statistics(), 0
        with after(made, embedding, logits):
            refuse_not_finite(embedding, min(chunk.row + manifest.chunk_rows, manifest.num_images) - new)
            arrays = {**encode(encoding, embedding, logits), **chunk.patches}
            return arrays, statistics_of(embedding, logits), int((~embedding.any(-1)).sum())

    def write(chunk: Chunk, made: torch.Event | None, targets: Targets | None) -> int | None:
        """The rows that are safe now; None: another worker has this chunk's shard."""
        nonlocal dead
        if writer.claim(chunk.row // len(manifest.rows(0))) != chunk.row:
            return None
        arrays, statistics, zeros = targets or encoded(chunk, made)
        writer.append(job.chunk_arrays(chunk.row, arrays), statistics)
        dead += zeros
        return writer.rows_done

    with ThreadPoolExecutor(1, "write", partial(use_device, device)) as pool:
        for shards in work.share.runs(writer):
            rows = [np.arange(writer.start(shard), manifest.rows(shard).stop) for shard in shards]
            writing: Future[int | None] | None = None
            with closing(chunks_of(np.concatenate([*rows, np.arange(0)]))) as several:
                for chunk in several:
                    if writing is not None:
                        if (done := writing.result()) is None:
                            break
                        work.progress.rows(done, work.data.num_images)
                    made = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                    # On a CPU, the OpenMP threads of another thread would slow down the teacher's (as in prefetch.py).
                    targets = encoded(chunk, made) if device.type == "cpu" else None
                    writing = pool.submit(write, chunk, made, targets)
            if writing is not None:
                writing.result()
            if writing is not None or not shards:
                work.progress.rows(writer.rows_done, work.data.num_images)
    return dead
