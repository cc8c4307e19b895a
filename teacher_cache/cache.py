"""Stage 1, top to bottom: run the teacher once over every view that will be asked for, and store what it says.

data.beton -> loader -> augment -> teacher -> encode -> targets.zarr
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.errors import FailureError, MisuseError
from ..common.files import differences, locked
from ..common.images.beton import Beton
from ..common.run import autocast, pick_device, versions
from ..common.store.encodings import Encoding
from ..common.store.manifest import StoreManifest
from ..common.store.reader import TargetStore, add_prototypes
from ..common.store.writer import StoreWriter, begun_store
from ..common.teacher import embedder
from ..common.views.loader import Batch, LoaderConfig, ViewLoader, ViewSet
from ..common.views.recipes import Recipe, get_recipe
from .prototypes import PrototypeConfig, fit_prototypes, refuse_unsuitable
from .teachers import Teacher, TeacherConfig, load_teacher

TEMPORARY = Encoding("embedding", dtype="float16")
"""Of the embeddings that lie beside a store of logits until prototypes are fitted to them."""


@dataclass(frozen=True)
class CacheConfig:
    """What to cache. ``views`` a image get ids 0 .. views-1; ``view_size`` None is the teacher's own size in pixels.

    ``prototypes`` > 0 fits that many for a teacher without a head. ``batch_size`` counts images, each with all its views.
    """

    data: Path
    out: Path
    teacher: TeacherConfig
    recipe: Recipe = field(default_factory=lambda: get_recipe("dino"))
    views: int = 4
    seed: int = 0
    encoding: Encoding = field(default_factory=lambda: Encoding("embedding"))
    view_size: int | None = None
    prototypes: int = 0
    precision: str = "fp32"
    device: str = "auto"
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.views < 1:
            raise MisuseError(f"--views is {self.views}, expected at least 1")
        if self.prototypes < 0:
            raise MisuseError(f"--prototypes is {self.prototypes}, expected 0 (none) or more")


@dataclass(frozen=True)
class CachePlan:
    """What caching will cost: bytes before compression, and seconds at the speed of a trial batch.

    ``temporary_bytes_per_view`` are those of the embeddings that lie beside the store until prototypes are fitted to them.
    """

    num_images: int
    views: int
    bytes_per_view: int
    temporary_bytes_per_view: int
    free_bytes: int
    rows_done: int
    views_per_second: float

    @property
    def total_bytes(self) -> int:
        return self.num_images * self.views * (self.bytes_per_view + self.temporary_bytes_per_view)

    @property
    def seconds(self) -> float:
        """Of the rows still to do."""
        return (self.num_images - self.rows_done) * self.views / self.views_per_second


@dataclass(frozen=True)
class CacheProgress:
    """What a caller may show: the plan before the first batch, then the rows done; both may be left out."""

    plan: Callable[[CachePlan], None] = lambda plan: None
    rows: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None


def cache_teacher(config: CacheConfig, progress: CacheProgress | None = None) -> StoreManifest:
    """Write the store ``config.out``, going on from the last whole chunk when an earlier run was killed.

    Raises MisuseError for settings that cannot be and for a disk that is too small, FailureError when the disk fills up.
    """
    progress = progress or CacheProgress()
    device = pick_device(config.device)
    autocast(device, config.precision)  # refuse a wrong precision before anything is loaded
    config.loader.check_device(device)
    data = Beton(config.data)
    teacher = load_teacher(config.teacher).to(device)
    _check(config, data, teacher)

    embeddings = _temporary_store(config)
    if embeddings is None:
        _write_store(config.out, config.encoding, config, data, teacher, device, progress)
        if config.prototypes:
            _with_prototypes(config.out, config, progress)
        return TargetStore.open(config.out).manifest

    # Logits of a teacher without a head: its embeddings first, then prototypes fitted on them, then the logits of both.
    manifest = _manifest(config, config.encoding, data, teacher, config.prototypes)
    if not _is_complete(config.out, manifest, "teacher_temp"):
        begun_store(config.out, manifest, "teacher_temp")  # refuses what is in the way, before the embeddings are made
        _write_store(embeddings, TEMPORARY, config, data, teacher, device, progress)
        _reencode(_with_prototypes(embeddings, config, progress), config, data, teacher, progress)
    shutil.rmtree(embeddings, ignore_errors=True)
    return TargetStore.open(config.out).manifest


def _temporary_store(config: CacheConfig) -> Path | None:
    """Where the embeddings lie that prototypes are fitted to, when the store itself is to hold only logits."""
    beside = config.out.with_name(f".{config.out.name}.embeddings")
    return beside if config.prototypes and config.encoding.needs_logits else None


def _check(config: CacheConfig, data: Beton, teacher: Teacher) -> None:
    if config.prototypes and teacher.num_prototypes:
        raise MisuseError(
            f"teacher {teacher.name} has {teacher.num_prototypes} prototypes of its own: leave out --prototypes"
        )
    if config.encoding.needs_logits and not (teacher.num_prototypes or config.prototypes):
        raise MisuseError(
            f"--encoding {config.encoding.kind} needs prototype logits, but teacher {teacher.name} has no head: "
            "add --prototypes K to fit some, or use --encoding embedding"
        )
    if config.prototypes:
        refuse_unsuitable(config.prototypes, data.num_images * config.views)


def _manifest(
    config: CacheConfig, encoding: Encoding, data: Beton, teacher: Teacher, num_prototypes: int
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
        head="fitted" if config.prototypes and num_prototypes else teacher.head_name,
        dim=teacher.dim,
        num_prototypes=num_prototypes,
        teacher_temp=teacher.teacher_temp,
        encoding=encoding.to_dict(),
        precision=config.precision,
        geometry=config.loader.geometry,
        versions=versions("rob", "torch", "timm", "zarr", "numcodecs"),
    )


def _is_complete(path: Path, manifest: StoreManifest, *may_differ: str) -> bool:
    """Whether ``path`` is a finished store of exactly this. MisuseError when it is a finished store of something else."""
    if not (path / "zarr.json").exists():
        return False
    stored = TargetStore.open(path).manifest.to_json()
    asked = {k: v for k, v in manifest.to_json().items() if k not in ("versions", *may_differ)}
    different = "; ".join(differences(stored, asked))
    if different:
        raise MisuseError(
            f"{path} is already there and complete, with other settings ({different}): give another path, or delete it first"
        )
    return True


def _write_store(
    path: Path,
    encoding: Encoding,
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    device: torch.device,
    progress: CacheProgress,
) -> None:
    """Decode, teacher and write side by side: the loader is batches ahead, and a chunk is written while the next is computed."""
    manifest = _manifest(config, encoding, data, teacher, teacher.num_prototypes)
    if _is_complete(path, manifest, "num_prototypes", "head", "teacher_temp"):
        progress.note(f"{path} is complete already: nothing to do")
        return
    begun_store(path, manifest)  # refuses what is in the way, before the teacher runs
    _refuse_what_will_not_fit(config, data, teacher)
    plan = _plan(config, data, teacher, device)  # nothing is begun with a view size that the teacher can't take
    writer = StoreWriter.open_or_resume(path, manifest)
    batch_size = _batch_size(config, manifest.chunk_rows)
    if batch_size != config.loader.batch_size:
        progress.note(
            f"batches of {batch_size} images, not {config.loader.batch_size}: "
            f"a batch size must divide the {manifest.chunk_rows} images of a chunk"
        )
    progress.plan(replace(plan, rows_done=writer.rows_done))
    progress.rows(writer.rows_done, data.num_images)

    dead = 0

    def write(embedding: Tensor, logits: Tensor | None) -> int:
        nonlocal dead
        _refuse_not_finite(embedding, writer.rows_done)
        dead += int((~embedding.any(-1)).sum())
        statistics = {"embedding_sum": embedding.double().sum((0, 1)).numpy()}
        if logits is not None:
            statistics["usage"] = torch.bincount(logits.argmax(-1).flatten(), minlength=teacher.num_prototypes).numpy()
        writer.append(encoding.encode(embedding, logits), statistics)
        return writer.rows_done

    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        writing: Future[int] | None = None
        for embedding, logits in _chunks(config, data, teacher, device, writer.rows_done, manifest.chunk_rows):
            if writing is not None:
                progress.rows(writing.result(), data.num_images)
            writing = pool.submit(write, embedding, logits)
        if writing is not None:
            progress.rows(writing.result(), data.num_images)
    if dead:
        progress.note(
            f"{dead:,} {'view has' if dead == 1 else 'views have'} an all-zero embedding, of which a student learns nothing: "
            f"a --view-size above {manifest.view_size} leaves the teacher more to see"
        )
    statistics = writer.statistics
    if teacher.centre is not None:
        statistics["centre"] = teacher.centre.cpu().numpy()
    writer.finish(None if teacher.prototypes is None else teacher.prototypes.cpu().numpy(), statistics)


def _refuse_not_finite(embedding: Tensor, first_row: int) -> None:
    """FailureError naming the images, ``first_row`` onwards, whose embeddings (rows, V, D) are NaN or infinite."""
    image_ids = (first_row + (~embedding.isfinite()).flatten(1).any(1).nonzero().flatten()).tolist()
    if image_ids:
        named = ", ".join(map(str, image_ids[:5])) + (" ..." if len(image_ids) > 5 else "")
        raise FailureError(
            f"the teacher's output for {len(image_ids)} of {len(embedding)} images is NaN or infinite (image ids {named}): "
            "check its weights, its --precision and these images"
        )


def _chunks(
    config: CacheConfig, data: Beton, teacher: Teacher, device: torch.device, first_row: int, chunk_rows: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The teacher's embeddings (rows, V, D), and logits (rows, V, K) if it has prototypes, a chunk of rows at a time, on the CPU.

    Batches never straddle chunks, so a resumed run computes the very batches that an uninterrupted one does.
    """
    loader_config = replace(config.loader, batch_size=_batch_size(config, chunk_rows))
    loader = ViewLoader(data, config.recipe, config.seed, loader_config)
    size = config.view_size or teacher.view_size
    embed = embedder(teacher, config.recipe, size, device, config.precision)
    parts: list[Tensor] = []
    for batch in loader.epoch(np.arange(first_row, data.num_images), [ViewSet(tuple(range(config.views)), size)]):
        parts.append(embed(batch))
        rows = sum(map(len, parts))
        if rows == chunk_rows or batch.image_ids[-1] == data.num_images - 1:
            embedding = torch.cat(parts)
            parts = []
            logits = None if teacher.prototypes is None else teacher.logits(embedding)
            yield embedding.cpu(), None if logits is None else logits.cpu()


def _batch_size(config: CacheConfig, chunk_rows: int) -> int:
    """The largest that is asked for and divides a chunk."""
    return max(size for size in range(1, min(config.loader.batch_size, chunk_rows) + 1) if chunk_rows % size == 0)


def _bytes_per_view(config: CacheConfig, teacher: Teacher) -> dict[Path, int]:
    """Before compression, of the store and of the temporary one beside it, if there is one."""
    stores = {config.out: config.encoding}
    if (temporary := _temporary_store(config)) is not None:
        stores[temporary] = TEMPORARY
    num_prototypes = teacher.num_prototypes or config.prototypes
    return {path: encoding.bytes_per_view(teacher.dim, num_prototypes) for path, encoding in stores.items()}


def _refuse_what_will_not_fit(config: CacheConfig, data: Beton, teacher: Teacher) -> None:
    needed = 0
    for path, bytes_per_view in _bytes_per_view(config, teacher).items():
        done = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.exists() else 0
        needed += max(0, data.num_images * config.views * bytes_per_view - done)
    free = shutil.disk_usage(_existing_parent(config.out)).free
    if needed > free:
        beside = "" if _temporary_store(config) is None else ", with the embeddings beside it until it is done,"
        raise MisuseError(
            f"{config.out}{beside} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there: "
            "take fewer --views, a smaller encoding (--encoding topk, or embedding with --store-dtype int8), or another disk"
        )


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.absolute().parent)


def _plan(config: CacheConfig, data: Beton, teacher: Teacher, device: torch.device) -> CachePlan:
    """Times the teacher alone on one small batch of noise, after one to warm up."""
    size = config.view_size or teacher.view_size
    embed = embedder(teacher, config.recipe, size, device, config.precision)
    images = min(config.loader.batch_size, max(1, 32 // config.views))
    noise = torch.randint(0, 256, (images, config.views, 3, size, size), dtype=torch.uint8)
    plain = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).expand(images, config.views, 8)
    batch = Batch(np.arange(images), (noise,), (plain,))
    for _ in range(2):
        start = time.perf_counter()
        embed(batch).cpu()
        seconds = time.perf_counter() - start
    bytes_per_view, *temporary = _bytes_per_view(config, teacher).values()
    return CachePlan(
        data.num_images,
        config.views,
        bytes_per_view,
        sum(temporary),
        shutil.disk_usage(_existing_parent(config.out)).free,
        0,
        images * config.views / seconds,
    )


def _with_prototypes(path: Path, config: CacheConfig, progress: CacheProgress) -> TargetStore:
    """The complete store of embeddings at ``path`` with prototypes, which are fitted to it unless it has them already."""
    if TargetStore.open(path).manifest.num_prototypes != config.prototypes:
        with locked(path / ".lock", f"{path}: another rob cache-teacher fits prototypes to it; wait for it to finish"):
            _fit(TargetStore.open(path), config, progress)
    return TargetStore.open(path)


def _fit(store: TargetStore, config: CacheConfig, progress: CacheProgress) -> None:
    if store.manifest.num_prototypes == config.prototypes:
        return  # by the process that held the lock until now
    if store.manifest.num_prototypes:
        raise MisuseError(
            f"{store.path} has {store.manifest.num_prototypes} fitted prototypes already, --prototypes asks for "
            f"{config.prototypes}: give another path to cache to"
        )

    def read(start: int, stop: int) -> Tensor:
        return store.encoding.decode(store.read(start, stop))["embedding"]

    progress.note(f"fitting {config.prototypes} prototypes on the cached embeddings")
    fitted = fit_prototypes(read, store.manifest.num_images, PrototypeConfig(config.prototypes, seed=config.seed))
    progress.note(
        f"{fitted.used:.1%} of the prototypes are used, balance {fitted.balance:.2f} of 1, mean cosine {fitted.cohesion:.2f}; "
        f"teacher temperature {fitted.teacher_temp:.3g}"
    )
    add_prototypes(store.path, fitted.prototypes.numpy(), "fitted", fitted.teacher_temp, store.statistics)


def _reencode(source: TargetStore, config: CacheConfig, data: Beton, teacher: Teacher, progress: CacheProgress) -> None:
    """Turn a store of embeddings with prototypes into the store of logits ``config.out``, chunk by chunk."""
    assert source.prototypes is not None
    prototypes = torch.from_numpy(source.prototypes)
    manifest = _manifest(config, config.encoding, data, teacher, len(prototypes))
    manifest = replace(manifest, teacher_temp=source.manifest.teacher_temp)
    writer = StoreWriter.open_or_resume(config.out, manifest)
    progress.note(f"encoding {config.encoding.kind} targets")
    while (start := writer.rows_done) < data.num_images:
        stop = min(start + writer.manifest.chunk_rows, data.num_images)
        embedding = source.encoding.decode(source.read(start, stop))["embedding"]
        logits = embedding @ prototypes.T
        usage = torch.bincount(logits.argmax(-1).flatten(), minlength=len(prototypes)).numpy()
        statistics = {"embedding_sum": embedding.double().sum((0, 1)).numpy(), "usage": usage}
        writer.append(config.encoding.encode(embedding, logits), statistics)
        progress.rows(stop, data.num_images)
    writer.finish(source.prototypes)
