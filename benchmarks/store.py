"""The target store: bytes a view, what storing loses, which codec, and how fast targets are read in training order.

    rob bench store

On a real teacher's embeddings (cached in the run, or a store of embeddings that is there already), as they are and reduced to
256 dimensions by PCA, the width of DINO's bottleneck, which is what its prototypes see; 4096 prototypes fitted to either. Targets
of patches are of fewer images, at the teacher's own size, over and over.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from rob.benchmarks.codecs import codec_rows
from rob.benchmarks.fidelity import fidelity, restored
from rob.benchmarks.report import Report, median_of, parts
from rob.benchmarks.store_patches import patch_cases
from rob.benchmarks.store_speed import Reading, reading_speeds, sequential_speed, speed_ratios, speed_rows
from rob.common.images.pack import PackConfig, pack
from rob.common.run import pick_device
from rob.common.store.codec import decode, decode_patches, encode
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import SHARD_CHUNKS, StoreManifest
from rob.common.store.patches import PatchChoice, PatchEncoding
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
    read a pass; ``sample`` images are measured for fidelity; ``student_batch`` images are a step of the ViT-Tiny. Targets of
    patches are of ``patch_images``, in views of ``patch_size``; a pass reads ``patch_rows_read``, with a window as training's is.
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
    patch_images: int = 256
    patch_size: int = 224
    patch_rows_read: int = 8192
    patch_window_mib: float = 256
    device: str = "auto"


def run(config: StoreBenchConfig) -> Report:
    """Measure everything in one run; about eight minutes on 2 cores, most of it the teacher's."""
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
            for encoding in parts(ENCODINGS):
                rows.append({"what": f"{name}: {label(encoding)}"} | _encoding_row(case, prototypes, encoding, config))
        prototypes = _prototypes(reduced, config)
        for encoding in parts(PACKED):
            some = reduced[:1024]
            arrays = encode(encoding, some, some @ prototypes.T)
            rows += codec_rows(label(encoding), arrays, some[..., 0].numel(), encoding.shuffle, config.rounds)
        demand = _student_images_per_second(config, device)
        rows.append({"what": "ViT-Tiny at 224 px, a training step", "images_per_second": demand})
        how = Reading(device, config.batch_size, config.window_mib, config.threads, config.rounds)
        for encoding in parts(READ):
            arrays = encode(encoding, reduced, reduced @ prototypes.T)
            path = Path(folder) / f"{encoding.kind}.zarr"
            _write(path, encoding, arrays, prototypes, config.rows_read)
            speeds = reading_speeds(TargetStore.open(path), how)
            for shard_chunks in (1, SHARD_CHUNKS, 128):
                other = Path(folder) / f"{encoding.kind}{shard_chunks}.zarr"
                _write(other, encoding, arrays, prototypes, config.rows_read, shard_chunks)
                name = f"decompressing only, shards of {shard_chunks} chunks"
                speeds[name] = sequential_speed(TargetStore.open(other), config.rounds)
            rows += speed_rows(label(encoding), speeds)
            ratios |= speed_ratios("" if encoding is READ[0] else f"{encoding.kind}_", speeds, demand)
        how = replace(how, window_mib=config.patch_window_mib)
        for kind, name, path in _patch_stores(config, Path(folder), prototypes):
            store = TargetStore.open(path)
            on_disk = _bytes_on_disk(path) / config.patch_rows_read / config.views
            rows.append({"what": name, "raw_bytes_per_view": store.manifest.bytes_per_view, "bytes_per_view": on_disk})
            speeds = reading_speeds(store, how)
            rows += speed_rows(name, speeds)
            ratios |= speed_ratios(f"patches_{kind}_", speeds, demand)
    work = {
        "teacher": f"{source.manifest.teacher} at {source.manifest.view_size} px",
        "images": len(embedding),
        "views": embedding.shape[1],
        "prototypes": config.prototypes,
        "rows_read": config.rows_read,
        "batch_size": config.batch_size,
        "window_mib": config.window_mib,
        "threads": config.threads,
        "patches": f"{config.patch_images} images at {config.patch_size} px, as {config.patch_rows_read}, window "
        f"{config.patch_window_mib:g} MiB",
        "load_average": os.getloadavg()[0],  # more than this run's own threads: other work slowed the timings
    }
    return Report.of("store", device, work, rows, ratios)


def label(encoding: Encoding) -> str:
    """``embedding int8``, ``topk 64``, ``dense``."""
    detail = {"embedding": encoding.dtype, "topk": f"k={encoding.k}", "dense": ""}[encoding.kind]
    return f"{encoding.kind} {detail}".strip()


# ---- real targets ----


def _patch_stores(config: StoreBenchConfig, folder: Path, prototypes: Tensor) -> Iterator[tuple[str, str, Path]]:
    """Kind, name and path of stores with int8 embeddings and patch targets beside them, one a kind."""
    pooled, tokens = _with_patches(config, folder)
    arrays = encode(READ[0], _reduced(pooled, config.bottleneck), None)
    for case in patch_cases(tokens, config.prototypes):
        path = folder / f"patches_{case.encoding.kind}.zarr"
        _write(path, READ[0], arrays | case.arrays, prototypes, config.patch_rows_read, patches=case.encoding)
        yield case.encoding.kind, f"{label(READ[0])} and {case.name}", path


def _with_patches(config: StoreBenchConfig, folder: Path) -> tuple[Tensor, Tensor]:
    """Unit embeddings (N, V, D) and maps (N, V, C, g, g) float32 of the teacher, at its own size."""
    few = replace(config, images=config.patch_images, view_size=config.patch_size)
    store = TargetStore.open(_cache(few, folder / "patches", PatchChoice("grid", patch_dim=0)))
    stored, patches = store.read(0, min(few.images, store.manifest.num_images)), store.patches
    assert patches is not None
    rows = decode_patches(patches, stored)["embedding"]
    maps = rows.mT.unflatten(3, (patches.grid, patches.grid))
    return F.normalize(decode(store.encoding, stored)["embedding"], dim=-1), maps


def _cache(config: StoreBenchConfig, folder: Path, patches: PatchChoice | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    data = config.data or folder / "data.beton"
    if config.data is None:
        pack(PackConfig("fashion-mnist", data, raw=True, limit=config.images))
    out, encoding = folder / "teacher.zarr", Encoding("embedding", "float32")
    caching = CacheConfig(data, out, config.teacher, get_recipe("dino"), config.views, encoding=encoding)
    caching = replace(caching, view_size=config.view_size, device=config.device)
    cache_teacher(replace(caching, patches=patches or PatchChoice("none")))
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
    patches: PatchEncoding | None = None,
) -> None:
    """A store of ``num_images`` rows: ``arrays``, over and over."""
    rows, views = next(iter(arrays.values())).shape[:2]
    manifest = StoreManifest(
        data_fingerprint="",
        num_images=num_images,
        recipe={},
        seed=0,
        view_ids=tuple(range(views)),
        view_size=1,
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
        patches=None if patches is None else patches.to_dict(),
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
        on_disk = _bytes_on_disk(path)
    row: Row = {
        "raw_bytes_per_view": encoding.bytes_per_view(embedding.shape[-1], len(prototypes)),
        "bytes_per_view": on_disk / some.shape[0] / some.shape[1],
        **fidelity(encoding, sample, prototypes),
    }
    if encoding.kind == "topk":
        row["worst_tail_error"] = _tail_error(sample, prototypes, encoding)
    return row


def _bytes_on_disk(path: Path) -> int:
    """Of all targets: the shards."""
    arrays = TargetStore.open(path).arrays
    files = (path / name / "c" for name in arrays)
    return sum(file.stat().st_size for folder in files for file in folder.rglob("*") if file.is_file())


def _tail_error(embedding: Tensor, prototypes: Tensor, encoding: Encoding) -> float:
    """The largest error of the tail's log-sum-exp at temperatures between those stored."""
    logits, target = embedding @ prototypes.T, restored(encoding, embedding, prototypes)
    assert isinstance(target, TopKTarget)
    rest = logits.scatter(-1, logits.topk(encoding.k).indices, -torch.inf)
    return max((log_tail(target, temp) - (rest / temp).logsumexp(-1)).abs().max().item() for temp in OFF_LADDER)


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
