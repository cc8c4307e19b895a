"""Is a store what its teacher says? Every chunk's checksum, and a sample of views computed anew by the live teacher.

The views go the way they went when they were cached: the same loader path, augmentation and precision, all from the
manifest. What may differ is bounded: the rounding of the encoding, exactly, and that of the arithmetic, by ``COMPUTE_ERROR``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from ..common.errors import FailureError, MisuseError
from ..common.images.beton import Beton
from ..common.patches import PatchTargets
from ..common.run import autocast, choose_precision, pick_device
from ..common.store.codec import decode, decode_patches
from ..common.store.encodings import Encoding
from ..common.store.reader import TargetStore
from ..common.teacher import dense_embedder, embedder
from ..common.tokens import TOKENS
from ..common.views.loader import Batch, LoaderConfig, ViewLoader, ViewSet, geometry, resolve_loader
from ..common.views.recipes import Recipe
from .config import VerifyConfig
from .teachers import Teacher, load_teacher

COMPUTE_ERROR = {"fp32": 0.03, "fp16": 0.05, "bf16": 0.25}
"""How far a unit embedding may move (Euclidean distance) when the batch, the device or a library is another.

EfficientNet-Lite0 on CIFAR-10 at 96 px: 2e-6 with the size of the batch, up to 0.02 with the rounding of TF32 (which CUDA
convolutions use for float32) and up to 0.18 with that of bfloat16; the nearest other image is 0.75 away or more.
"""

Difference = tuple[float, float, float]
"""Of a view: cosine, difference and error, as ``Sample`` has them."""

HALF_STEP = 2.0**-11
"""Largest relative error of rounding to float16."""
INT8_STEP = 0.57
"""Largest error of an int8 value in units of its scale: half a step, and what rounding the scale cuts off the largest value."""


@dataclass(frozen=True)
class VerifyProgress:
    """What a caller may show: chunks read and views compared, each as (done, total); both may be left out."""

    chunks: Callable[[int, int], None] = lambda done, total: None
    samples: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Sample:
    """One view, stored against computed anew: embeddings, or prototype logits where the store holds those."""

    image_id: int
    view_id: int
    cosine: float
    """1 where both are all zero."""
    difference: float
    """Largest absolute difference of a value."""
    error: float
    """The difference in units of what rounding explains: 1 is the limit."""


@dataclass(frozen=True)
class VerifyResult:
    """A store that passed: the chunks read, and the samples with the worst one first."""

    chunks: int
    samples: tuple[Sample, ...] = field(repr=False)

    @property
    def worst(self) -> Sample:
        return self.samples[0]

    @property
    def mean_cosine(self) -> float:
        return float(np.mean([sample.cosine for sample in self.samples]))

    @property
    def lowest_cosine(self) -> float:
        """Not always of the worst sample: rounding explains more of some differences than of others."""
        return min(sample.cosine for sample in self.samples)


def verify(config: VerifyConfig, progress: VerifyProgress | None = None) -> VerifyResult:
    """Check the store ``config.store``.

    Raises MisuseError when the data set or the teacher is another than the store's, FailureError when a chunk is damaged or
    a view is not what the teacher says, with the image and view ids, what was found and what was expected.
    """
    progress = progress or VerifyProgress()
    store, data = TargetStore.open(config.store), Beton(config.data)
    store.check_data(data.manifest)
    manifest, recipe = store.manifest, Recipe.from_dict(store.manifest.recipe)
    device = pick_device(config.device)
    precision = choose_precision(device, config.precision or manifest.precision)
    autocast(device, precision)
    teacher = load_teacher(config.teacher).to(device)
    _refuse_another_teacher(store, teacher)

    _check_chunks(store, progress)

    if manifest.geometry != "pillow" and geometry(LoaderConfig()) == "pillow":
        raise MisuseError(f"{store.place} was cached with ffcv, which is not installed here: verify it where it is")
    loading = resolve_loader(LoaderConfig("auto", config.batch_size, config.workers), device, manifest.geometry)
    loader = ViewLoader(data, recipe, manifest.seed, loading)
    tolerance = config.tolerance or max(COMPUTE_ERROR[precision], COMPUTE_ERROR[manifest.precision])
    compare = Comparison(store.encoding, store.prototypes, tolerance)
    seen = teacher, recipe, manifest.view_size, device, precision
    if store.patches is None:
        embed = embedder(*seen)
        judge = lambda stored, batch: compare(decode(store.encoding, stored), embed(batch)[:, 0].cpu())  # noqa: E731
    else:
        dense, of_patches = dense_embedder(*seen), PatchComparison(store, teacher, tolerance, device)

        def judge(stored: dict[str, np.ndarray], batch: Batch) -> list[Difference]:
            embedding, features = dense(batch)
            pooled = compare(decode(store.encoding, stored), embedding[:, 0].cpu())
            return [
                max(both, key=itemgetter(2)) for both in zip(pooled, of_patches(stored, features[:, 0]), strict=True)
            ]

    columns = _draw(config, manifest.num_images, len(manifest.view_ids))
    total = sum(map(len, columns))
    samples: list[Sample] = []
    for column, (view_id, image_ids) in enumerate(zip(manifest.view_ids, columns, strict=True)):
        for batch in loader.epoch(image_ids, [ViewSet((view_id,), manifest.view_size)]):
            stored = {name: rows[:, column] for name, rows in store.rows(batch.image_ids).items()}
            for image_id, values in zip(batch.image_ids, judge(stored, batch), strict=True):
                samples.append(Sample(int(image_id), view_id, *values))
            progress.samples(len(samples), total)
    samples.sort(key=lambda sample: -sample.error)
    _refuse_wrong(store, data, samples)
    return VerifyResult(manifest.num_chunks, tuple(samples))


def _refuse_another_teacher(store: TargetStore, teacher: Teacher) -> None:
    manifest = store.manifest
    if teacher.name == manifest.teacher and teacher.pooling != manifest.pooling:
        raise MisuseError(
            f"{store.place} was cached with {_pooled(manifest.pooling)} of teacher {manifest.teacher}, this is "
            f"{_pooled(teacher.pooling)}: give the `teacher_features` it was made with, or cache it again"
        )
    if (teacher.name, teacher.weights_hash) != (manifest.teacher, manifest.weights_hash):
        raise MisuseError(
            f"{store.place} was cached from teacher {manifest.teacher} with weights {manifest.weights_hash[:12]}, this is "
            f"{teacher.name} with weights {teacher.weights_hash[:12]}: give the `teacher` and `checkpoint` it was made with"
        )


def _pooled(pooling: str | None) -> str:
    return TOKENS[pooling] if pooling else "what timm pools"


def _check_chunks(store: TargetStore, progress: VerifyProgress) -> None:
    if damaged := store.verify(progress.chunks):
        more = f" (and {len(damaged) - 1} more are damaged)" if len(damaged) > 1 else ""
        raise FailureError(damaged[0] + more)


def _draw(config: VerifyConfig, num_images: int, views: int) -> list[np.ndarray]:
    """For each column of the store, the ascending image ids whose view of that column is a sample."""
    total = min(config.samples, num_images * views)
    chosen = np.random.default_rng(config.seed).choice(num_images * views, total, replace=False)
    image_ids, columns = np.divmod(np.sort(chosen), views)
    return [image_ids[columns == column] for column in range(views)]


class Comparison:
    """Stored targets of B views against the embeddings (B, D) computed anew.

    Called with the decoded arrays, it gives for each view what ``Sample`` holds: cosine, difference, error.

    With e the Euclidean distance by which arithmetic may move a unit embedding, a logit may move by e times the norm of its
    prototype (Cauchy-Schwarz), and a log-sum-exp of logits / temp by the largest of these over temp.
    """

    def __init__(self, encoding: Encoding, prototypes: np.ndarray | None, tolerance: float) -> None:
        self.encoding, self.tolerance = encoding, tolerance
        self.prototypes = None if prototypes is None else torch.from_numpy(prototypes)

    def __call__(self, stored: dict[str, Tensor], embedding: Tensor) -> list[Difference]:
        if self.encoding.kind == "embedding":
            values, expected, error = self._embedding(stored["embedding"], embedding)
        else:
            values, expected, error = self._logits(stored, embedding)
        cosine, difference = torch.cosine_similarity(values, expected, dim=1), (values - expected).abs().amax(1)
        cosine[~(values.any(1) | expected.any(1))] = 1
        error = error.nan_to_num(torch.inf)  # a NaN would pass every comparison
        return list(zip(cosine.tolist(), difference.tolist(), error.tolist(), strict=True))

    def _embedding(self, stored: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        allowed = torch.full((len(stored),), self.tolerance)
        if self.encoding.dtype == "float16":
            allowed += HALF_STEP
        elif self.encoding.dtype == "int8":
            allowed += INT8_STEP * expected.abs().amax(1) / 127 * expected.shape[1] ** 0.5
        return stored, expected, (stored - expected).norm(dim=1) / allowed

    def _logits(self, stored: dict[str, Tensor], embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.prototypes is not None
        every = embedding @ self.prototypes.T
        # Fitted prototypes are compared with embeddings in half precision (asked.TEMPORARY).
        moved = (self.tolerance + HALF_STEP) * self.prototypes.norm(dim=1).amax()
        if self.encoding.kind == "dense":
            logits, expected = stored["logits"], every
            return logits, expected, ((logits - expected).abs() / (moved + HALF_STEP * expected.abs())).amax(1)
        logits, ids = stored["logits"], stored["ids"]
        expected, largest = every.gather(1, ids), every.topk(ids.shape[1], dim=1).values
        allowed = moved + HALF_STEP * largest.abs()
        # Close logits may have changed places: the stored ids must have these logits, and the largest logits must be these.
        error = torch.maximum((logits - expected).abs(), (logits - largest).abs()).div(allowed).amax(1)
        if ids.shape[1] < every.shape[1]:
            temps = torch.tensor(self.encoding.temps)
            rest = every.scatter(1, ids, -torch.inf)[:, None, :] / temps[:, None]
            tail = (stored["tail"] - rest.logsumexp(2)).abs() * temps / moved
            error = torch.maximum(error, tail.amax(1))
        return logits, expected, error


class PatchComparison:
    """The same of a store's patch targets, of the position of a view that is off by the most."""

    def __init__(self, store: TargetStore, teacher: Teacher, tolerance: float, device: torch.device) -> None:
        assert store.patches is not None
        self.encoding = store.patches
        self.targets = PatchTargets(self.encoding, teacher.head, teacher.patch_prototypes, store.statistics, device)
        prototypes = None if teacher.patch_prototypes is None else teacher.patch_prototypes.cpu().numpy()
        self.compare = Comparison(self.encoding.of_one, prototypes, tolerance)

    def __call__(self, stored: dict[str, np.ndarray], features: Tensor) -> list[Difference]:
        """``features`` (B, C, h, w) as the backbone gives them."""
        rows = self.targets.rows(features).cpu()
        decoded = decode_patches(self.encoding, stored)
        if self.encoding.kind == "grid":  # tokens are not of unit length
            scale = rows.square().sum(2).mean(1).sqrt()[:, None, None].clamp(min=1e-12)
            rows, decoded = rows / scale, {"embedding": decoded["embedding"] / scale}
        flat = {name: values.flatten(0, 1) for name, values in decoded.items()}
        found, positions = self.compare(flat, rows.flatten(0, 1)), rows.shape[1]
        return [max(found[at : at + positions], key=itemgetter(2)) for at in range(0, len(found), positions)]


def _refuse_wrong(store: TargetStore, data: Beton, samples: list[Sample]) -> None:
    """FailureError for samples, the worst first, of which one is off by more than rounding explains."""
    wrong = sum(sample.error > 1 for sample in samples)
    if wrong:
        worst = samples[0]
        raise FailureError(
            f"{store.place}: {wrong} of {len(samples)} views are not what the teacher says; the worst is view {worst.view_id} of "
            f"image {worst.image_id} ({data.manifest.paths[worst.image_id]}): cosine {worst.cosine:.6f} of stored with expected "
            f"{store.encoding.kind} values, {worst.error:,.0f} times the difference that rounding explains (expected at most 1): "
            "delete the store and run rob cache-teacher again"
        )
