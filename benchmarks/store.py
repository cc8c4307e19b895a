"""The target store: bytes a view, what storing loses, which codec, and how fast targets are read in training order.

    rob bench store

On a real teacher's embeddings (cached in the run, or a store of embeddings that is there already), as they are and reduced to
256 dimensions by PCA, the width of DINO's bottleneck, which is what its prototypes see; 4096 prototypes fitted to either.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor

from rob.benchmarks.codecs import codec_rows
from rob.benchmarks.fidelity import fidelity, restored
from rob.benchmarks.report import Report, median_of
from rob.common.images.pack import PackConfig, pack
from rob.common.order import block_shuffled_order
from rob.common.run import pick_device
from rob.common.store.codec import decode, encode
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import SHARD_CHUNKS, StoreManifest
from rob.common.store.prefetch import TargetPrefetcher, window_blocks
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from rob.common.views.recipes import get_recipe
from rob.student_train.kernels.target import TopKTarget
from rob.student_train.kernels.topk import log_tail
from rob.teacher_cache.cache import CacheConfig, cache_teacher
from rob.teacher_cache.prototypes import PrototypeConfig, fit_prototypes
from rob.teacher_cache.teachers import TeacherConfig

ENCODINGS = (
    Encoding("embedding", "float32"),
    Encoding("embedding", "float16"),
    Encoding("embedding", "int8"),
    Encoding("topk", k=64),
    Encoding("topk", k=256),
    Encoding("dense"),
)
PACKED = (Encoding("embedding", "float16"), Encoding("embedding", "int8"), Encoding("topk", k=64), Encoding("dense"))
READ = (Encoding("embedding", "int8"), Encoding("topk", k=64))
OFF_LADDER = (0.03, 0.047, 0.062, 0.085)
Row = dict[str, Any]


@dataclass(frozen=True)
class StoreBenchConfig:
    """``targets`` is a store of embeddings, or None to cache one from ``data`` (None: Fashion-MNIST). ``rows_read`` images are
    read a pass; ``sample`` images are measured for fidelity; ``student_batch`` images are a step of the ViT-Tiny.
    """

    targets: Path | None = None
    data: Path | None = None
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig("efficientnet_lite0"))
    view_size: int = 96
    images: int = 4096
    views: int = 4
    prototypes: int = 4096
    bottleneck: int = 256
    sample: int = 512
    rows_read: int = 65536
    batch_size: int = 256
    window_mib: float = 32
    threads: int = 2
    rounds: int = 5
    student_batch: int = 32
    device: str = "auto"


def run(config: StoreBenchConfig) -> Report:
    """Measure everything in one run; about six minutes on 2 cores, most of it the teacher's."""
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        source = TargetStore.open(config.targets or _cache(config, Path(folder)))
        stored = source.read(0, min(config.images, source.manifest.num_images))
        embedding = decode(source.encoding, stored)["embedding"]
        if not source.manifest.num_prototypes:
            embedding = F.normalize(embedding, dim=-1)
        rows: list[Row] = []
        ratios: dict[str, float | None] = {}
        reduced = _reduced(embedding, config.bottleneck)
        for name, case in (("pooled", embedding), (f"PCA to {config.bottleneck}", reduced)):
            prototypes = _prototypes(case, config)
            for encoding in ENCODINGS:
                rows.append({"what": f"{name}: {label(encoding)}"} | _encoding_row(case, prototypes, encoding, config))
        prototypes = _prototypes(reduced, config)
        for encoding in PACKED:
            some = reduced[:1024]
            arrays = encode(encoding, some, some @ prototypes.T)
            rows += codec_rows(label(encoding), arrays, some[..., 0].numel(), encoding.shuffle, config.rounds)
        demand = _student_images_per_second(config, device)
        rows.append({"what": "ViT-Tiny at 224 px, a training step", "images_per_second": demand})
        for encoding in READ:
            arrays = encode(encoding, reduced, reduced @ prototypes.T)
            path = Path(folder) / f"{encoding.kind}.zarr"
            _write(path, encoding, arrays, prototypes, config.rows_read)
            speeds = _reading_speeds(TargetStore.open(path), device, config)
            for shard_chunks in (1, SHARD_CHUNKS, 128):
                other = Path(folder) / f"{encoding.kind}{shard_chunks}.zarr"
                _write(other, encoding, arrays, prototypes, config.rows_read, shard_chunks)
                speeds[f"decompressing only, shards of {shard_chunks} chunks"] = _sequential_speed(other, config)
            rows += [
                {"what": f"read {label(encoding)}: {how}", "images_per_second": value} for how, value in speeds.items()
            ]
            prefix = "" if encoding is READ[0] else f"{encoding.kind}_"
            ratios |= {
                f"{prefix}vs_sequential_decode": speeds["training order"] / speeds["sequential"],
                f"{prefix}vs_random_rows": speeds["training order"] / speeds["random rows"],
                f"{prefix}vs_sequential_same_threads": speeds["training order"] / speeds["sequential, threads"],
                f"{prefix}vs_zarr_python": speeds["sequential"] / speeds["sequential, zarr-python"],
                f"{prefix}vs_student_demand": speeds["training order"] / demand,
            }
    work = {
        "teacher": f"{source.manifest.teacher} at {source.manifest.view_size} px",
        "images": len(embedding),
        "views": embedding.shape[1],
        "prototypes": config.prototypes,
        "rows_read": config.rows_read,
        "batch_size": config.batch_size,
        "window_mib": config.window_mib,
        "threads": config.threads,
        "load_average": os.getloadavg()[0],  # more than this run's own threads: other work slowed the timings
    }
    return Report.of("store", device, work, rows, ratios)


def label(encoding: Encoding) -> str:
    """``embedding int8``, ``topk 64``, ``dense``."""
    detail = {"embedding": encoding.dtype, "topk": f"k={encoding.k}", "dense": ""}[encoding.kind]
    return f"{encoding.kind} {detail}".strip()


# ---- real targets ----


def _cache(config: StoreBenchConfig, folder: Path) -> Path:
    data = config.data or folder / "data.beton"
    if config.data is None:
        pack(PackConfig("fashion-mnist", data, raw=True, limit=config.images))
    out, encoding = folder / "teacher.zarr", Encoding("embedding", "float32")
    caching = CacheConfig(data, out, config.teacher, get_recipe("dino"), config.views, encoding=encoding)
    cache_teacher(replace(caching, view_size=config.view_size, device=config.device))
    return out


def _reduced(embedding: Tensor, dim: int) -> Tensor:
    """The first ``dim`` principal components (N, V, dim), as unit rows."""
    flat = embedding.flatten(0, 1)
    torch.manual_seed(0)
    _, _, directions = torch.pca_lowrank(flat, dim, niter=4)
    return F.normalize((embedding - flat.mean(0)) @ directions, dim=-1)


def _prototypes(embedding: Tensor, config: StoreBenchConfig) -> Tensor:
    def read(start: int, stop: int) -> Tensor:
        return embedding[start:stop]

    return fit_prototypes(read, len(embedding), PrototypeConfig(config.prototypes, epochs=3)).prototypes


def _write(
    path: Path,
    encoding: Encoding,
    arrays: Mapping[str, np.ndarray],
    prototypes: Tensor,
    num_images: int,
    shard_chunks: int = SHARD_CHUNKS,
) -> None:
    """A store of ``num_images`` rows: ``arrays``, over and over."""
    rows, views = next(iter(arrays.values())).shape[:2]
    manifest = StoreManifest(
        data_fingerprint="",
        num_images=num_images,
        recipe={},
        seed=0,
        view_ids=tuple(range(views)),
        view_size=0,
        teacher="",
        weights_hash="",
        head="",
        dim=prototypes.shape[1],
        num_prototypes=len(prototypes),
        teacher_temp=None,
        encoding=encoding.to_dict(),
        precision="fp32",
        geometry="",
        versions={},
        shard_chunks=shard_chunks,
    )
    writer = StoreWriter.open_or_resume(path, manifest)
    while writer.rows_done < num_images:
        ids = np.arange(writer.rows_done, min(writer.rows_done + manifest.chunk_rows, num_images))
        writer.append({name: values[ids % rows] for name, values in arrays.items()})
    writer.finish(prototypes.numpy())


# ---- bytes and fidelity ----


def _encoding_row(embedding: Tensor, prototypes: Tensor, encoding: Encoding, config: StoreBenchConfig) -> Row:
    sample = embedding[:: max(1, len(embedding) // config.sample)]
    some = embedding[:1024] if encoding.kind == "dense" else embedding
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.zarr"
        _write(path, encoding, encode(encoding, some, some @ prototypes.T), prototypes, len(some))
        on_disk = sum(
            file.stat().st_size for name in TargetStore.open(path).arrays for file in path.glob(f"{name}/**/0")
        )
    row: Row = {
        "raw_bytes_per_view": encoding.bytes_per_view(embedding.shape[-1], len(prototypes)),
        "bytes_per_view": on_disk / some.shape[0] / some.shape[1],
        **fidelity(encoding, sample, prototypes),
    }
    if encoding.kind == "topk":
        row["worst_tail_error"] = _tail_error(sample, prototypes, encoding)
    return row


def _tail_error(embedding: Tensor, prototypes: Tensor, encoding: Encoding) -> float:
    """The largest error of the tail's log-sum-exp at temperatures between those stored."""
    logits, target = embedding @ prototypes.T, restored(encoding, embedding, prototypes)
    assert isinstance(target, TopKTarget)
    rest = logits.scatter(-1, logits.topk(encoding.k).indices, -torch.inf)
    return max((log_tail(target, temp) - (rest / temp).logsumexp(-1)).abs().max().item() for temp in OFF_LADDER)


# ---- reading ----


def _reading_speeds(store: TargetStore, device: torch.device, config: StoreBenchConfig) -> dict[str, float]:
    """Images/s of each way to read, all ending with tensors on the device; the sides take turns. "sequential" is one loop
    over the chunks as they lie, "threads" the same with as many threads as the prefetcher reads with.
    """
    num_images, chunk_rows = store.manifest.num_images, store.manifest.chunk_rows
    order = block_shuffled_order(num_images, chunk_rows, window_blocks(store, config.window_mib), seed=0, epoch=0)
    some = order[:: max(1, num_images // (4 * config.batch_size))]  # four batches of rows from everywhere
    rng = np.random.default_rng(0)
    group = zarr.open_group(store.path, mode="r")
    pool = ThreadPoolExecutor(config.threads)

    def use(arrays: Mapping[str, np.ndarray]) -> None:
        decode(store.encoding, {name: torch.from_numpy(values).to(device) for name, values in arrays.items()})

    def sequential(read: Callable[[int, Mapping[str, np.ndarray]], None], threads: int = 1) -> int:
        def part(thread: int) -> None:
            buffer = {name: values[0] for name, values in store.empty(1).items()}
            for chunk in range(thread, store.manifest.num_chunks, threads):
                read(chunk, buffer)
                use(buffer)

        for done in [pool.submit(part, thread) for thread in range(threads)]:
            done.result()
        return num_images

    def zarr_chunk(chunk: int, out: Mapping[str, np.ndarray]) -> None:
        for name, values in out.items():
            values[:] = group[name][chunk * chunk_rows : (chunk + 1) * chunk_rows]  # type: ignore[index]

    def random_rows() -> int:
        ids = rng.permutation(some)
        for start in range(0, len(ids), config.batch_size):
            use(store.rows(ids[start : start + config.batch_size]))
        return len(ids)

    with TargetPrefetcher(
        store, config.batch_size, window_mib=config.window_mib, threads=config.threads, device=device
    ) as prefetcher:
        sides: dict[str, Callable[[], int]] = {
            "sequential": lambda: sequential(store.read_chunk),
            "sequential, threads": lambda: sequential(store.read_chunk, config.threads),
            "training order": lambda: sum(len(batch.image_ids) for batch in prefetcher.epoch(order)),
            "random rows": random_rows,
            "sequential, zarr-python": lambda: sequential(zarr_chunk),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(config.rounds + 1):
            for name, side in sides.items():
                start = perf_counter()
                images = side()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append((perf_counter() - start) / images)
    pool.shutdown()
    return {name: 1 / median(values[1:]) for name, values in seconds.items()}


def _sequential_speed(path: Path, config: StoreBenchConfig) -> float:
    """Images/s of checking and decompressing all chunks in one loop."""
    store = TargetStore.open(path)
    return store.manifest.num_images / median_of(store.verify, config.rounds)


def _student_images_per_second(config: StoreBenchConfig, device: torch.device) -> float:
    """A ViT-Tiny's training steps on one batch that is on the device already: forward, backward, SGD; bf16 on a GPU."""
    student = timm.create_model("vit_tiny_patch16_224", num_classes=256).to(device)
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3)
    batch_size = config.student_batch * (8 if device.type == "cuda" else 1)
    images = torch.randn(batch_size, 3, 224, 224, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = student(images).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return batch_size / median_of(step, config.rounds)


if __name__ == "__main__":
    report = run(StoreBenchConfig())
    report.show()
    print(report.write())
