"""Stage 1, top to bottom: run the teacher once over every view that will be asked for, and store what it says.

data.beton -> loader -> augment -> teacher -> encode -> targets.zarr
"""

import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..common.images.beton import Beton
from ..common.places import local_path, shown
from ..common.run import allow_fast_arithmetic, autocast, choose_precision, pick_device, use_device
from ..common.store.codec import encode
from ..common.store.encodings import Encoding
from ..common.store.manifest import StoreManifest
from ..common.store.reader import TargetStore
from ..common.teacher import dense_embedder, embedder
from ..common.views.loader import ViewLoader, ViewSet, check_loader, settled
from .asked import (
    TEMPORARY,
    begun_geometry,
    bytes_per_view_of,
    check_asked,
    is_complete,
    manifest_of,
    refuse_what_is_in_the_way,
    temporary_store,
    within_ladder,
)
from .chunks import Chunk, after, chunks, fitting_batch, refuse_not_finite
from .config import CacheConfig
from .cost import TRIAL_VIEWS, CachePlan, free_bytes, refuse_what_will_not_fit, views_per_second
from .fitted import statistics_of, with_prototypes, write_logits
from .growth import Growth, growth_of, in_its_place
from .patches import fixed_arrays, patch_encoding, with_patches
from .prototypes import PrototypeConfig
from .share import WAIT, Share, beside
from .teachers import Teacher, load_teacher


@dataclass(frozen=True)
class CacheProgress:
    """What a caller may show, each of which may be left out: the plan, the rows done, notes, the batches that prototypes were
    fitted to, and what is being waited for meanwhile."""

    plan: Callable[[CachePlan], None] = lambda plan: None
    rows: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None
    fitting: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda text: None


def cache_teacher(
    config: CacheConfig, progress: CacheProgress | None = None, teacher: Teacher | None = None
) -> StoreManifest:
    """Write the store ``config.out``, going on from the last whole chunk when an earlier run was killed. A complete one is given
    what it lacks: views, or the rows of images that were appended to its data. A ``teacher`` that is given is taken as it is,
    instead of ``config.teacher``'s being loaded.

    Under torchrun all ranks write it together, each with a device of its own, and return when it is whole. With
    ``config.part`` this process makes its part of the shards, and returns; the store is whole once all parts ran.

    Raises MisuseError for settings that cannot be and for a disk that is too small, FailureError when the disk fills up.
    """
    progress = progress or CacheProgress()
    share = Share.of(config.part)
    config = replace(config, out=local_path(config.out))
    device = pick_device(config.device)
    autocast(device, config.precision)  # refuse a wrong precision before anything is loaded
    allow_fast_arithmetic(device, config.precision)
    config = replace(config, precision=choose_precision(device, config.precision))
    check_loader(config.loader, device)
    config = replace(config, loader=settled(config.loader, device, begun_geometry(config)))
    data = Beton(config.data, config.local_dir)
    progress.say("loading the teacher")
    teacher = (teacher or load_teacher(config.teacher)).to(device)
    check_asked(config, data, teacher)
    patches = patch_encoding(config, data, teacher, progress.note)

    fitting = PrototypeConfig(config.prototypes, seed=config.seed)
    embeddings = temporary_store(config)
    if embeddings is None:
        manifest = manifest_of(config, config.encoding, patches, data, teacher, teacher.num_prototypes)
        if not _grow(manifest, config, data, teacher, device, progress, share):
            return manifest
        if not _write_store(config.out, manifest, config, data, teacher, device, progress, share):
            return manifest
        if config.prototypes:
            with_prototypes(config.out, fitting, progress.note, device, progress.fitting, wait=share.split is not None)
        return TargetStore.open(config.out).manifest

    # Logits of a teacher without a head: its embeddings first, then prototypes fitted on them, then the logits of both.
    manifest = manifest_of(config, config.encoding, patches, data, teacher, config.prototypes)
    temporary = manifest_of(config, TEMPORARY, patches, data, teacher, teacher.num_prototypes)
    if not _grow(manifest, config, data, teacher, device, progress, share):
        return manifest
    with beside(config.out, embeddings):
        if not is_complete(config.out, manifest, "teacher_temp"):
            # Refuses what is in the way, before the embeddings are made.
            refuse_what_is_in_the_way(config.out, manifest, share, "teacher_temp")
            if not _write_store(embeddings, temporary, config, data, teacher, device, progress, share):
                return manifest
            wait = share.split is not None
            source = with_prototypes(embeddings, fitting, progress.note, device, progress.fitting, wait)
            progress.note(f"encoding {config.encoding.kind} targets")
            temp = within_ladder(config.encoding, source.manifest.teacher_temp, progress.note)
            manifest = replace(manifest, teacher_temp=temp)
            write_logits(source, config.out, manifest, progress.rows, device, share.of_all())
    return TargetStore.open(config.out).manifest


def _grow(
    manifest: StoreManifest,
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    device: torch.device,
    progress: CacheProgress,
    share: Share,
) -> bool:
    """Give the complete store ``config.out`` what ``manifest`` has more. False: this worker's share of it is done, and it is not
    whole yet."""
    while (growth := growth_of(config.out, manifest, data.manifest, config.prototypes)) is not None:
        with in_its_place(growth):
            again = growth_of(config.out, manifest, data.manifest, config.prototypes)
            if again is None or again.manifest != growth.manifest:
                continue  # another worker put it in its place meanwhile
            if not _write_store(growth.path, growth.manifest, config, data, teacher, device, progress, share, growth):
                return False
        time.sleep(WAIT)  # for workers that are still at it: the last of them puts it in its place
    return True


def _write_store(
    path: Path,
    manifest: StoreManifest,
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    device: torch.device,
    progress: CacheProgress,
    share: Share,
    growth: Growth | None = None,
) -> bool:
    """Decode, teacher and write side by side: the loader is batches ahead, and a chunk is written while the next is computed.
    With a ``growth``, of what its store lacks.

    False: this worker's share is done, and the store is not whole yet.
    """
    if is_complete(path, manifest, "num_prototypes", "head", "teacher_temp"):
        if growth is None:
            progress.note(f"{shown(path)} is complete already: nothing to do")
        return True
    refuse_what_is_in_the_way(path, manifest, share)  # before the teacher runs
    if growth is None:
        store_bytes = bytes_per_view_of(config, teacher, manifest.patch_encoding)
    else:
        progress.note(f"{config.out}: {growth.says}")
        store_bytes = {path: manifest.bytes_per_view}
    views = data.num_images * config.views
    refuse_what_will_not_fit(config.out, {path: views * bytes_ for path, bytes_ in store_bytes.items()})
    patches = manifest.patch_encoding
    seen = teacher, config.recipe, manifest.view_size, device, config.precision
    dense = None if patches is None else dense_embedder(*seen)
    embed = embedder(*seen) if dense is None else lambda batch, at_once=None: dense(batch, at_once)[0]
    # Tried before anything is begun: the teacher may not take views of this size.
    new_views = manifest.view_ids if growth is None else growth.new_views
    few = min(config.loader.batch_size, max(1, TRIAL_VIEWS // len(new_views)))
    progress.say("trying the teacher on a few views, for the plan")
    trial = ViewLoader(data, config.recipe, config.seed, replace(config.loader, batch_size=few))
    speed = views_per_second(embed, trial, few, ViewSet(new_views, manifest.view_size), data.num_images)
    writer = share.join(path, manifest)
    if writer is None:
        return True
    of_patches: Mapping[str, np.ndarray] = {}
    batch_size = fitting_batch(config.loader.batch_size, manifest.chunk_rows)
    if patches is None or dense is None:
        says = lambda batch: (embed(batch, batch_size), {})  # noqa: E731
    else:
        make = partial(fixed_arrays, patches, config, data, teacher, manifest.view_size, dense, progress.note)
        of_patches = writer.kept("patches", make) if growth is None else growth.store.statistics
        says = with_patches(patches, teacher, partial(dense, at_once=batch_size), of_patches, device)
    if batch_size != config.loader.batch_size:
        progress.note(
            f"batches of {batch_size} images, not {config.loader.batch_size}: "
            f"a batch size must divide the {manifest.chunk_rows} images of a chunk"
        )
    own, *beside = store_bytes.values()
    free = free_bytes(config.out)
    done = writer.rows_done
    for_patches = 0 if patches is None else patches.bytes_per_view
    views_done = 0 if growth is None else growth.views_there
    todo = done if growth is None or views_done else max(done, growth.rows_there)
    views = len(manifest.view_ids)
    progress.plan(
        CachePlan(data.num_images, views, own, sum(beside), for_patches, free, todo, speed, share.parts, views_done)
    )
    progress.rows(done, data.num_images)

    dead, encoding = 0, Encoding.from_dict(manifest.encoding)

    def write(chunk: Chunk, made: torch.Event | None) -> bool:
        """A chunk; where it is: of a GPU's only what is stored comes home. False: another worker has its shard."""
        nonlocal dead
        if writer.claim(chunk.row // len(manifest.rows(0))) != chunk.row:
            return False
        if chunk.embedding is None:
            assert growth is not None
            writer.append(growth.merged(chunk.row, {}), growth.no_statistics())
            return True
        chunk = chunk if growth is None else chunk.last(growth.new_rows(chunk.row))
        embedding, logits = chunk.embedding, chunk.logits
        assert embedding is not None
        with after(made, embedding, logits):
            refuse_not_finite(embedding, chunk.row)
            dead += int((~embedding.any(-1)).sum())
            arrays, statistics = encode(encoding, embedding, logits), statistics_of(embedding, logits)
        arrays |= chunk.patches
        writer.append(arrays if growth is None else growth.merged(chunk.row, arrays), statistics)
        return True

    logits_of = None if teacher.prototypes is None else teacher.logits
    if growth is not None and teacher.prototypes is None:
        logits_of = growth.logits_of(device, TEMPORARY)

    def made_of(rows: np.ndarray) -> Generator[Chunk]:
        if growth is not None:
            yield from map(Chunk, growth.kept(rows))
            rows = growth.made(rows, batch_size)
        with closing(chunks(loader, rows, says, manifest, new_views, logits_of)) as made:
            yield from made

    loader = ViewLoader(data, config.recipe, config.seed, replace(config.loader, batch_size=batch_size))
    with ThreadPoolExecutor(1, "write", partial(use_device, device)) as pool:
        for shards in share.runs(writer):
            rows = [np.arange(writer.start(shard), manifest.rows(shard).stop) for shard in shards]
            writing: Future[bool] | None = None
            with closing(made_of(np.concatenate([*rows, np.arange(0)]))) as several:
                for chunk in several:
                    if writing is not None:
                        if not writing.result():
                            break
                        progress.rows(writer.rows_done, data.num_images)
                    made = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                    writing = pool.submit(write, chunk, made)
            if writing is not None:
                writing.result()
            if writing is not None or not shards:
                progress.rows(writer.rows_done, data.num_images)
    if dead:
        progress.note(
            f"{dead:,} {'view has' if dead == 1 else 'views have'} an all-zero embedding, of which a student learns nothing: "
            f"a `view_size` above {manifest.view_size} leaves the teacher more to see"
        )
    if missing := writer.missing():
        at = f"{len(missing):,} of {manifest.num_shards:,} shards"
        progress.note(
            f"{shown(path)}: this part is done; {at} are missing, and whoever makes the last of them finishes the store"
        )
        return False
    if growth is not None:
        writer.finish(growth.store.prototypes, growth.statistics(writer.statistics))
        return True
    more = dict(of_patches) if teacher.centre is None else {**of_patches, "centre": teacher.centre.cpu().numpy()}
    writer.finish(None if teacher.prototypes is None else teacher.prototypes.cpu().numpy(), more)
    return True
