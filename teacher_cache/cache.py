"""Stage 1, top to bottom: run the teacher once over every view that will be asked for, and store what it says.

data.beton -> loader -> augment -> teacher -> encode -> targets.zarr
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.errors import MisuseError
from ..common.images.beton import Beton
from ..common.run import allow_fast_arithmetic, autocast, choose_precision, pick_device, use_device, versions
from ..common.store.begun import begun_store, half_written
from ..common.store.codec import encode
from ..common.store.encodings import Encoding
from ..common.store.manifest import StoreManifest, differing
from ..common.store.patches import PatchEncoding
from ..common.store.reader import TargetStore
from ..common.teacher import dense_embedder, embedder
from ..common.views.loader import ViewLoader, ViewSet, check_loader, geometry, settled
from .chunks import after, chunks, fitting_batch, refuse_not_finite
from .config import CacheConfig
from .cost import TRIAL_VIEWS, CachePlan, free_bytes, refuse_what_will_not_fit, views_per_second
from .fitted import statistics_of, with_prototypes, write_logits
from .patches import fixed_arrays, patch_encoding, with_patches
from .prototypes import PrototypeConfig, refuse_unsuitable
from .share import Share, beside
from .teachers import Teacher, load_teacher

TEMPORARY = Encoding("embedding", dtype="float16")
"""Of the embeddings that lie beside a store of logits until prototypes are fitted to them."""


@dataclass(frozen=True)
class CacheProgress:
    """What a caller may show, each of which may be left out: the plan, the rows done, notes, and the batches that prototypes
    were fitted to."""

    plan: Callable[[CachePlan], None] = lambda plan: None
    rows: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None
    fitting: Callable[[int, int], None] = lambda done, total: None


def cache_teacher(
    config: CacheConfig, progress: CacheProgress | None = None, teacher: Teacher | None = None
) -> StoreManifest:
    """Write the store ``config.out``, going on from the last whole chunk when an earlier run was killed. A ``teacher`` that is
    given is taken as it is, instead of ``config.teacher``'s being loaded.

    Under torchrun all ranks write it together, each with a device of its own, and return when it is whole. With
    ``config.part`` this process makes its part of the shards, and returns; the store is whole once all parts ran.

    Raises MisuseError for settings that cannot be and for a disk that is too small, FailureError when the disk fills up.
    """
    progress = progress or CacheProgress()
    share = Share.of(config.part)
    device = pick_device(config.device)
    autocast(device, config.precision)  # refuse a wrong precision before anything is loaded
    allow_fast_arithmetic(device, config.precision)
    config = replace(config, precision=choose_precision(device, config.precision))
    check_loader(config.loader, device)
    config = replace(config, loader=settled(config.loader, device, _begun_geometry(config)))
    data = Beton(config.data)
    teacher = (teacher or load_teacher(config.teacher)).to(device)
    _check(config, data, teacher)
    patches = patch_encoding(config, data, teacher, progress.note)

    fitting = PrototypeConfig(config.prototypes, seed=config.seed)
    embeddings = _temporary_store(config)
    if embeddings is None:
        manifest = _manifest(config, config.encoding, patches, data, teacher, teacher.num_prototypes)
        if not _write_store(config.out, manifest, config, data, teacher, device, progress, share):
            return manifest
        if config.prototypes:
            with_prototypes(config.out, fitting, progress.note, device, progress.fitting, wait=share.split is not None)
        return TargetStore.open(config.out).manifest

    # Logits of a teacher without a head: its embeddings first, then prototypes fitted on them, then the logits of both.
    manifest = _manifest(config, config.encoding, patches, data, teacher, config.prototypes)
    temporary = _manifest(config, TEMPORARY, patches, data, teacher, teacher.num_prototypes)
    with beside(config.out, embeddings):
        if not _is_complete(config.out, manifest, "teacher_temp"):
            # Refuses what is in the way, before the embeddings are made.
            _begun(config.out, manifest, share, "teacher_temp")
            if not _write_store(embeddings, temporary, config, data, teacher, device, progress, share):
                return manifest
            wait = share.split is not None
            source = with_prototypes(embeddings, fitting, progress.note, device, progress.fitting, wait)
            progress.note(f"encoding {config.encoding.kind} targets")
            temp = _within_ladder(config.encoding, source.manifest.teacher_temp, progress.note)
            manifest = replace(manifest, teacher_temp=temp)
            write_logits(source, config.out, manifest, progress.rows, device, share.of_all())
    return TargetStore.open(config.out).manifest


def _within_ladder(encoding: Encoding, temp: float | None, note: Callable[[str], None]) -> float | None:
    """The nearest temperature that a store of this encoding can be read at."""
    if temp is None or encoding.kind != "topk":
        return temp
    nearest = min(max(temp, min(encoding.temps)), max(encoding.temps))
    if nearest != temp:
        note(
            f"teacher temperature {nearest:g}, as the tail of topk targets is kept at {min(encoding.temps):g} to {nearest:g}"
        )
    return nearest


def _begun_geometry(config: CacheConfig) -> str | None:
    """Of the views in what is there already, whole or begun: it goes on as it began."""
    for path in (config.out, _temporary_store(config)):
        if path is not None and (path / "zarr.json").exists():
            return TargetStore.open(path).manifest.geometry
        if path is not None and (begun := half_written(path)):
            return begun.geometry
    return None


def _temporary_store(config: CacheConfig) -> Path | None:
    """Where the embeddings lie that prototypes are fitted to, when the store itself is to hold only logits."""
    beside = config.out.with_name(f".{config.out.name}.embeddings")
    return beside if config.prototypes and config.encoding.needs_logits else None


def _check(config: CacheConfig, data: Beton, teacher: Teacher) -> None:
    if config.prototypes and teacher.num_prototypes:
        raise MisuseError(
            f"teacher {teacher.name} has {teacher.num_prototypes} prototypes of its own: leave out `prototypes`"
        )
    if config.encoding.needs_logits and not (teacher.num_prototypes or config.prototypes):
        raise MisuseError(
            f"`encoding` {config.encoding.kind} needs prototype logits, but teacher {teacher.name} has no head: "
            "give a number of `prototypes` to fit, or use `encoding` embedding"
        )
    if config.prototypes:
        refuse_unsuitable(config.prototypes, data.num_images * config.views)


def _manifest(
    config: CacheConfig,
    encoding: Encoding,
    patches: PatchEncoding | None,
    data: Beton,
    teacher: Teacher,
    num_prototypes: int,
) -> StoreManifest:
    return StoreManifest(
        data_fingerprint=data.manifest.fingerprint,
        num_images=data.num_images,
        recipe=config.recipe.to_dict(),
        seed=config.seed,
        view_ids=tuple(range(config.views)),
        view_size=config.view_size or teacher.view_size,
        teacher=teacher.name,
        weights_hash=teacher.weights_hash,
        pooling=teacher.pooling,
        head="fitted" if config.prototypes and num_prototypes else teacher.head_name,
        dim=teacher.dim,
        num_prototypes=num_prototypes,
        teacher_temp=teacher.teacher_temp,
        encoding=encoding.to_dict(),
        patches=None if patches is None else patches.to_dict(),
        precision=config.precision,
        geometry=geometry(config.loader),
        versions=versions("rob", "torch", "timm", "zarr", "numcodecs"),
    )


def _is_complete(path: Path, manifest: StoreManifest, *may_differ: str) -> bool:
    """Whether ``path`` is a finished store of exactly this. MisuseError when it is a finished store of something else."""
    if not (path / "zarr.json").exists():
        return False
    stored = TargetStore.open(path).manifest.to_json()
    asked = {k: v for k, v in manifest.to_json().items() if k not in ("versions", *may_differ)}
    different = "; ".join(differing(stored, asked))
    if different:
        raise MisuseError(
            f"{path} is already there and complete, with other settings ({different}): give another path, or delete it first"
        )
    return True


def _begun(path: Path, manifest: StoreManifest, share: Share, *may_differ: str) -> None:
    """MisuseError where the store of ``manifest`` cannot be begun or gone on with at ``path``. Others may finish it any time."""
    try:
        begun_store(path, manifest, *may_differ)
    except MisuseError:
        if share.split is None or not _is_complete(path, manifest, *may_differ):
            raise


def _write_store(
    path: Path,
    manifest: StoreManifest,
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    device: torch.device,
    progress: CacheProgress,
    share: Share,
) -> bool:
    """Decode, teacher and write side by side: the loader is batches ahead, and a chunk is written while the next is computed.

    False: this worker's share is done, and the store is not whole yet.
    """
    if _is_complete(path, manifest, "num_prototypes", "head", "teacher_temp"):
        progress.note(f"{path} is complete already: nothing to do")
        return True
    _begun(path, manifest, share)  # refuses what is in the way, before the teacher runs
    store_bytes = _bytes_per_view(config, teacher, manifest.patch_encoding)
    views = data.num_images * config.views
    refuse_what_will_not_fit(config.out, {path: views * bytes_ for path, bytes_ in store_bytes.items()})
    patches = manifest.patch_encoding
    seen = teacher, config.recipe, manifest.view_size, device, config.precision
    dense = None if patches is None else dense_embedder(*seen)
    embed = embedder(*seen) if dense is None else lambda batch: dense(batch)[0]
    # Tried before anything is begun: the teacher may not take views of this size.
    few = min(config.loader.batch_size, max(1, TRIAL_VIEWS // config.views))
    trial = ViewLoader(data, config.recipe, config.seed, replace(config.loader, batch_size=few))
    speed = views_per_second(embed, trial, few, ViewSet(manifest.view_ids, manifest.view_size), data.num_images)
    writer = share.join(path, manifest)
    if writer is None:
        return True
    of_patches: Mapping[str, np.ndarray] = {}
    says = lambda batch: (embed(batch), {})  # noqa: E731
    if patches is not None and dense is not None:
        make = partial(fixed_arrays, patches, config, data, teacher, manifest.view_size, dense, progress.note)
        of_patches = writer.kept("patches", make)
        says = with_patches(patches, teacher, dense, of_patches, device)
    batch_size = fitting_batch(config.loader.batch_size, manifest.chunk_rows)
    if batch_size != config.loader.batch_size:
        progress.note(
            f"batches of {batch_size} images, not {config.loader.batch_size}: "
            f"a batch size must divide the {manifest.chunk_rows} images of a chunk"
        )
    own, *beside = store_bytes.values()
    free = free_bytes(config.out)
    done = writer.rows_done
    for_patches = 0 if patches is None else patches.bytes_per_view
    progress.plan(
        CachePlan(data.num_images, config.views, own, sum(beside), for_patches, free, done, speed, share.parts)
    )
    progress.rows(done, data.num_images)

    dead, encoding = 0, Encoding.from_dict(manifest.encoding)

    def write(
        row: int, embedding: Tensor, logits: Tensor | None, patch: dict[str, np.ndarray], made: torch.Event | None
    ) -> bool:
        """The chunk at ``row``; where it is: of a GPU's only what is stored comes home. False: another worker has its shard."""
        nonlocal dead
        if writer.claim(row // len(manifest.rows(0))) != row:
            return False
        with after(made, embedding, logits):
            refuse_not_finite(embedding, row)
            dead += int((~embedding.any(-1)).sum())
            arrays, statistics = encode(encoding, embedding, logits), statistics_of(embedding, logits)
        writer.append(arrays | patch, statistics)
        return True

    loader = ViewLoader(data, config.recipe, config.seed, replace(config.loader, batch_size=batch_size))
    with ThreadPoolExecutor(1, "write", partial(use_device, device)) as pool:
        for shards in share.runs(writer):
            rows = [np.arange(writer.start(shard), manifest.rows(shard).stop) for shard in shards]
            made_of = chunks(loader, np.concatenate([*rows, np.arange(0)]), teacher, says, manifest)
            writing: Future[bool] | None = None
            with closing(made_of):
                for row, embedding, logits, patch in made_of:
                    if writing is not None:
                        if not writing.result():
                            break
                        progress.rows(writer.rows_done, data.num_images)
                    made = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                    writing = pool.submit(write, row, embedding, logits, patch, made)
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
            f"{path}: this part is done; {at} are missing, and whoever makes the last of them finishes the store"
        )
        return False
    more = dict(of_patches) if teacher.centre is None else {**of_patches, "centre": teacher.centre.cpu().numpy()}
    writer.finish(None if teacher.prototypes is None else teacher.prototypes.cpu().numpy(), more)
    return True


def _bytes_per_view(config: CacheConfig, teacher: Teacher, patches: PatchEncoding | None) -> dict[Path, int]:
    """Before compression, of the store and of the temporary one beside it, if there is one."""
    stores = {config.out: config.encoding}
    if (temporary := _temporary_store(config)) is not None:
        stores[temporary] = TEMPORARY
    num_prototypes = teacher.num_prototypes or config.prototypes
    beside = 0 if patches is None else patches.bytes_per_view
    return {path: encoding.bytes_per_view(teacher.dim, num_prototypes) + beside for path, encoding in stores.items()}
