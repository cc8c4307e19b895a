"""Stage 1, top to bottom: run the teacher once over every view that will be asked for, and store what it says.

data.beton -> loader -> augment -> teacher -> encode -> targets.zarr
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.errors import FailureError, MisuseError
from ..common.images.beton import Beton
from ..common.run import allow_fast_arithmetic, autocast, choose_precision, pick_device, versions
from ..common.store.codec import encode
from ..common.store.encodings import Encoding
from ..common.store.manifest import StoreManifest, differing
from ..common.store.patches import PatchEncoding
from ..common.store.reader import TargetStore
from ..common.store.writer import StoreWriter, begun_store, half_written
from ..common.teacher import dense_embedder, embedder
from ..common.views.loader import Batch, ViewLoader, ViewSet, check_loader, geometry, settled
from .config import CacheConfig
from .cost import CachePlan, free_bytes, refuse_what_will_not_fit, views_per_second
from .fitted import statistics_of, with_prototypes, write_logits
from .patches import fixed_arrays, patch_encoding, with_patches
from .prototypes import PrototypeConfig, refuse_unsuitable
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

    Raises MisuseError for settings that cannot be and for a disk that is too small, FailureError when the disk fills up.
    """
    progress = progress or CacheProgress()
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
        _write_store(config.out, config.encoding, patches, config, data, teacher, device, progress)
        if config.prototypes:
            with_prototypes(config.out, fitting, progress.note, device, progress.fitting)
        return TargetStore.open(config.out).manifest

    # Logits of a teacher without a head: its embeddings first, then prototypes fitted on them, then the logits of both.
    manifest = _manifest(config, config.encoding, patches, data, teacher, config.prototypes)
    if not _is_complete(config.out, manifest, "teacher_temp"):
        begun_store(config.out, manifest, "teacher_temp")  # refuses what is in the way, before the embeddings are made
        _write_store(embeddings, TEMPORARY, patches, config, data, teacher, device, progress)
        source = with_prototypes(embeddings, fitting, progress.note, device, progress.fitting)
        progress.note(f"encoding {config.encoding.kind} targets")
        temp = _within_ladder(config.encoding, source.manifest.teacher_temp, progress.note)
        write_logits(source, config.out, replace(manifest, teacher_temp=temp), progress.rows, device)
    shutil.rmtree(embeddings, ignore_errors=True)
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


def _write_store(
    path: Path,
    encoding: Encoding,
    patches: PatchEncoding | None,
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    device: torch.device,
    progress: CacheProgress,
) -> None:
    """Decode, teacher and write side by side: the loader is batches ahead, and a chunk is written while the next is computed."""
    manifest = _manifest(config, encoding, patches, data, teacher, teacher.num_prototypes)
    if _is_complete(path, manifest, "num_prototypes", "head", "teacher_temp"):
        progress.note(f"{path} is complete already: nothing to do")
        return
    begun_store(path, manifest)  # refuses what is in the way, before the teacher runs
    store_bytes = _bytes_per_view(config, teacher, patches)
    views = data.num_images * config.views
    refuse_what_will_not_fit(config.out, {path: views * bytes_ for path, bytes_ in store_bytes.items()})
    seen = teacher, config.recipe, manifest.view_size, device, config.precision
    dense = None if patches is None else dense_embedder(*seen)
    embed = embedder(*seen) if dense is None else lambda batch: dense(batch)[0]
    # Tried before anything is begun: the teacher may not take views of this size.
    speed = views_per_second(embed, config.loader.batch_size, config.views, manifest.view_size)
    writer = StoreWriter.open_or_resume(path, manifest)
    of_patches: Mapping[str, np.ndarray] = {}
    says = lambda batch: (embed(batch), {})  # noqa: E731
    if patches is not None and dense is not None:
        make = partial(fixed_arrays, patches, config, data, teacher, manifest.view_size, dense, progress.note)
        of_patches = writer.kept("patches", make)
        says = with_patches(patches, teacher, dense, of_patches, device)
    batch_size = _batch_size(config, manifest.chunk_rows)
    if batch_size != config.loader.batch_size:
        progress.note(
            f"batches of {batch_size} images, not {config.loader.batch_size}: "
            f"a batch size must divide the {manifest.chunk_rows} images of a chunk"
        )
    own, *beside = store_bytes.values()
    free = free_bytes(config.out)
    for_patches = 0 if patches is None else patches.bytes_per_view
    progress.plan(
        CachePlan(data.num_images, config.views, own, sum(beside), for_patches, free, writer.rows_done, speed)
    )
    progress.rows(writer.rows_done, data.num_images)

    dead = 0

    def write(embedding: Tensor, logits: Tensor | None, patch: dict[str, np.ndarray], made: torch.Event | None) -> int:
        """Where the chunk is: of a GPU's only what is stored comes home."""
        nonlocal dead
        with _after(made, embedding, logits):
            _refuse_not_finite(embedding, writer.rows_done)
            dead += int((~embedding.any(-1)).sum())
            arrays, statistics = encode(encoding, embedding, logits), statistics_of(embedding, logits)
        writer.append(arrays | patch, statistics)
        return writer.rows_done

    with ThreadPoolExecutor(1, "write", partial(_use_device, device)) as pool:
        writing: Future[int] | None = None
        for embedding, logits, patch in _chunks(config, data, teacher, says, writer.rows_done, manifest):
            if writing is not None:
                progress.rows(writing.result(), data.num_images)
            made = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            writing = pool.submit(write, embedding, logits, patch, made)
        if writing is not None:
            progress.rows(writing.result(), data.num_images)
    if dead:
        progress.note(
            f"{dead:,} {'view has' if dead == 1 else 'views have'} an all-zero embedding, of which a student learns nothing: "
            f"a `view_size` above {manifest.view_size} leaves the teacher more to see"
        )
    statistics = writer.statistics | dict(of_patches)
    if teacher.centre is not None:
        statistics["centre"] = teacher.centre.cpu().numpy()
    writer.finish(None if teacher.prototypes is None else teacher.prototypes.cpu().numpy(), statistics)


def _use_device(device: torch.device) -> None:
    """A thread starts out on GPU 0, whichever the process is on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def _after(made: torch.Event | None, *tensors: Tensor | None) -> Iterator[None]:
    """On CUDA, a stream that begins when the tensors are ``made``. In the teacher's own stream whoever wants to see them would
    wait for all that the teacher was given since, and the GPU then for the next chunk."""
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


def _refuse_not_finite(embedding: Tensor, first_row: int) -> None:
    """FailureError naming the images, ``first_row`` onwards, whose embeddings (rows, V, D) are NaN or infinite."""
    image_ids = (first_row + (~embedding.isfinite()).flatten(1).any(1).nonzero().flatten()).tolist()
    if image_ids:
        named = ", ".join(map(str, image_ids[:5])) + (" ..." if len(image_ids) > 5 else "")
        raise FailureError(
            f"the teacher's output for {len(image_ids)} of {len(embedding)} images is NaN or infinite (image ids {named}): "
            "check its weights, its `precision` and these images"
        )


def _chunks(
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    says: Callable[[Batch], tuple[Tensor, dict[str, np.ndarray]]],
    first_row: int,
    manifest: StoreManifest,
) -> Iterator[tuple[Tensor, Tensor | None, dict[str, np.ndarray]]]:
    """The teacher's embeddings (rows, V, D), and logits (rows, V, K) if it has prototypes, a chunk of rows at a time, on its
    device; and the arrays of its patch targets, if any.

    Batches never straddle chunks, so a resumed run computes the very batches that an uninterrupted one does.
    """
    loader_config = replace(config.loader, batch_size=_batch_size(config, manifest.chunk_rows))
    loader = ViewLoader(data, config.recipe, config.seed, loader_config)
    views = ViewSet(manifest.view_ids, manifest.view_size)
    parts: list[Tensor] = []
    of_patches: list[dict[str, np.ndarray]] = []
    for batch in loader.epoch(np.arange(first_row, data.num_images), [views]):
        embedded, arrays = says(batch)
        parts.append(embedded)
        of_patches.append(arrays)
        rows = sum(map(len, parts))
        if rows == manifest.chunk_rows or batch.image_ids[-1] == data.num_images - 1:
            embedding = torch.cat(parts)
            joined = {name: np.concatenate([arrays[name] for arrays in of_patches]) for name in arrays}
            parts, of_patches = [], []
            logits = None if teacher.prototypes is None else teacher.logits(embedding)
            yield embedding, logits, joined


def _batch_size(config: CacheConfig, chunk_rows: int) -> int:
    """The largest that is asked for and divides a chunk."""
    return max(size for size in range(1, min(config.loader.batch_size, chunk_rows) + 1) if chunk_rows % size == 0)


def _bytes_per_view(config: CacheConfig, teacher: Teacher, patches: PatchEncoding | None) -> dict[Path, int]:
    """Before compression, of the store and of the temporary one beside it, if there is one."""
    stores = {config.out: config.encoding}
    if (temporary := _temporary_store(config)) is not None:
        stores[temporary] = TEMPORARY
    num_prototypes = teacher.num_prototypes or config.prototypes
    beside = 0 if patches is None else patches.bytes_per_view
    return {path: encoding.bytes_per_view(teacher.dim, num_prototypes) + beside for path, encoding in stores.items()}
