"""The branch that was replaced: what makes the targets of a training step.

``CachedTargets`` reads what the teacher said once; ``OnlineTeacher`` runs the frozen teacher in every step, as a baseline
and to prove that the cache changes nothing; ``momentum.MomentumBranch`` has no teacher. Each says which views the student's
targets belong to, and answers, batch by batch, with a Target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..common.images.beton import Beton
from ..common.run import autocast
from ..common.store.encodings import Encoding
from ..common.store.prefetch import TargetPrefetcher, window_blocks
from ..common.store.reader import TargetStore
from ..common.views.loader import Batch, ViewSet
from ..common.views.recipes import Recipe
from .kernels.target import DenseTarget, EmbeddingTarget, Target, TopKTarget
from .pairing import ViewPlan

WINDOW_BLOCKS = 16
"""Blocks of 256 images within which an epoch's order is shuffled, unless the memory for targets holds fewer."""


@dataclass(frozen=True, eq=False)
class TargetSpace:
    """What a branch's targets are made of, for the objective to fit its head to.

    ``dim`` is the embedding's width D, ``num_prototypes`` K (0: none); ``has_embedding`` is False for a store of logits,
    ``has_all_logits`` for one of the top k alone, which serves temperatures within its ``ladder``. Where known:
    ``mean_embedding`` (D,) and ``mean_logits`` (K,) over the data set, the ``centre`` (K,) of the teacher's own file, its
    ``prototypes`` (K, D). ``usual_centre`` is what an objective that asks for no centre or Sinkhorn takes off.
    """

    dim: int
    num_prototypes: int
    has_embedding: bool
    teacher_temp: float | None = None
    mean_embedding: Tensor | None = None
    mean_logits: Tensor | None = None
    centre: Tensor | None = None
    prototypes: Tensor | None = None
    has_all_logits: bool = True
    ladder: tuple[float, ...] | None = None
    usual_centre: str = "none"


class TargetBranch(Protocol):
    """What training asks of a branch."""

    recipe: Recipe
    seed: int
    """Of the views; the student's training has a seed of its own."""
    views: int
    """Target views there are of an image: ids 0 .. views-1."""
    geometry: str | None
    """The resize path of the cached views; None when they are made on the spot."""
    window_blocks: int
    """Blocks within which the order may be shuffled."""
    space: TargetSpace
    description: dict[str, Any]
    """What the targets depend on, as plain values: a run is not resumed against others."""
    freeze_prototypes: int = 0
    """Epochs in which the student's prototypes usually stay as they are."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of the branch, by name."""
        return {}

    @property
    def average(self) -> nn.Module | None:
        """A slow copy of the student's backbone, exported beside it at the end."""
        return None

    def follow(self, model: nn.Module, steps_per_epoch: int, epochs: int) -> None:
        """Called once with the student and its objective (``train.StudentWithHead``) before the first step."""

    def before_step(self, step: int) -> None:
        """Called before step number ``step`` (from 0)."""

    def after_step(self, step: int) -> None:
        """Called when step number ``step`` has moved the student."""

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        """Views that the loader must render for the branch itself, after the student's."""
        ...

    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> "TargetStream":
        """The targets of one epoch's batches, in order."""
        ...


class TargetStream(Protocol):
    """One epoch's targets; a context manager, because a prefetcher runs behind it."""

    def __enter__(self) -> "TargetStream": ...
    def __exit__(self, *exception) -> None: ...
    def next(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target | None:
        """The target of the next batch, which is ``batch``: row b belongs to image ``batch.image_ids[b]``.

        ``crops`` are the student's, as it will see them. None: the student makes its own target.
        """
        ...


class CachedTargets(TargetBranch):
    """Targets from a store that ``rob cache-teacher`` wrote. Raises MisuseError when the store is of another data set."""

    def __init__(
        self, path: Path, data: Beton, device: torch.device, window_mib: float = 256, in_memory: bool = False
    ) -> None:
        """``window_mib`` bounds the memory of decompressed chunks; ``in_memory`` keeps the whole store from epoch to epoch."""
        self.store = TargetStore.open(path)
        self.store.check(data_fingerprint=data.manifest.fingerprint)
        manifest = self.store.manifest
        self.recipe, self.seed, self.views = Recipe.from_dict(manifest.recipe), manifest.seed, len(manifest.view_ids)
        self.geometry, self.device = manifest.geometry, device
        self.window_mib, self.in_memory = window_mib, in_memory
        self.window_blocks = min(WINDOW_BLOCKS, window_blocks(self.store, window_mib))
        self._prefetcher: TargetPrefetcher | None = None
        kind, prototypes, centre = self.store.encoding.kind, self.store.prototypes, self.store.statistics.get("centre")
        has_tail = kind == "topk" and self.store.encoding.k < manifest.num_prototypes
        self.prototypes = None if prototypes is None else torch.from_numpy(prototypes).to(device)
        mean = (
            torch.from_numpy(self.store.statistics["embedding_sum"] / (manifest.num_images * self.views))
            .float()
            .to(device)
        )
        # Logits are linear in the embedding: their mean is that of the mean embedding.
        self.space = TargetSpace(
            manifest.dim,
            manifest.num_prototypes,
            has_embedding=kind == "embedding",
            teacher_temp=manifest.teacher_temp,
            mean_embedding=mean,
            mean_logits=None if self.prototypes is None else self.prototypes @ mean,
            centre=None if centre is None else torch.from_numpy(centre).to(device),
            prototypes=self.prototypes,
            has_all_logits=kind != "topk",
            ladder=self.store.encoding.temps if has_tail else None,
        )
        told = ("teacher", "weights_hash", "head", "num_prototypes", "view_size", "precision", "geometry", "encoding")
        self.description = {
            "kind": "cached",
            **{name: getattr(manifest, name) for name in told},
            "views": self.views,
            "seed": self.seed,
        }

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        return ()

    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> "TargetStream":
        if self._prefetcher is None or self._prefetcher.batch_size != batch_size:
            self._prefetcher = TargetPrefetcher(
                self.store, batch_size, window_mib=self.window_mib, device=self.device, cache_in_memory=self.in_memory
            )
        self._prefetcher.columns = np.array(plan.targets)
        return _StoreStream(self, self._prefetcher, order)

    def make_target(self, arrays: dict[str, Tensor]) -> Target:
        """Decoded arrays (B, G, ...) of the store as the loss takes them."""
        return stored_target(self.store.encoding, arrays, self.prototypes, self.space.num_prototypes)


def stored_target(
    encoding: Encoding, arrays: Mapping[str, Tensor], prototypes: Tensor | None, num_prototypes: int
) -> Target:
    """What decoded arrays (B, G, ...) of a store say, with the store's K ``prototypes`` where it has some."""
    match encoding.kind:
        case "embedding":
            embedding = arrays["embedding"]
            return EmbeddingTarget(
                embedding, embedding.new_empty(0, embedding.shape[2]) if prototypes is None else prototypes
            )
        case "topk":
            return TopKTarget(arrays["ids"], arrays["logits"], arrays["tail"], encoding.temps, num_prototypes)
        case _:
            return DenseTarget(arrays["logits"])


class _StoreStream:
    def __init__(self, branch: CachedTargets, prefetcher: TargetPrefetcher, order: np.ndarray) -> None:
        self.branch, self.prefetcher = branch, prefetcher
        self.batches = prefetcher.epoch(order)

    def __enter__(self) -> "_StoreStream":
        return self

    def __exit__(self, *exception) -> None:
        self.prefetcher.close()

    def next(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target:
        ready = next(self.batches)
        assert np.array_equal(ready.image_ids, batch.image_ids), "the loader and the store read the same order"
        return self.branch.make_target(ready.targets)


class FrozenTeacher(Protocol):
    """What OnlineTeacher needs of a teacher: ``teacher_cache.teachers.Teacher`` has it, and the two stages stay apart."""

    @property
    def name(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def dim(self) -> int: ...
    @property
    def num_prototypes(self) -> int: ...
    @property
    def prototypes(self) -> Tensor | None: ...
    @property
    def centre(self) -> Tensor | None: ...
    @property
    def teacher_temp(self) -> float | None: ...
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) normalised by mean and std -> embeddings (N, D) float32, unit rows."""
        ...


class OnlineTeacher(TargetBranch):
    """Targets from the frozen teacher itself, run on every batch at ``view_size`` pixels.

    ``views`` bounds the view ids as a cache would: the same value gives the same views, and the same targets, as a
    cache of so many.
    """

    geometry = None
    window_blocks = WINDOW_BLOCKS

    def __init__(
        self,
        teacher: FrozenTeacher,
        recipe: Recipe,
        seed: int,
        views: int,
        view_size: int,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.teacher, self.recipe, self.seed, self.views = teacher, recipe, seed, views
        self.view_size, self.device, self.precision = view_size, device, precision
        self.space = TargetSpace(
            *(teacher.dim, teacher.num_prototypes),
            has_embedding=True,
            teacher_temp=teacher.teacher_temp,
            centre=teacher.centre,
            prototypes=teacher.prototypes,
        )
        self.description = {
            "kind": "online",
            "teacher": teacher.name,
            "weights_hash": teacher.weights_hash,
            "num_prototypes": teacher.num_prototypes,
            "view_size": view_size,
            "precision": precision,
            "views": views,
            "seed": seed,
        }
        self._mean, self._std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)

    def view_sets(self, plan: ViewPlan) -> tuple[ViewSet, ...]:
        return (ViewSet(plan.targets, self.view_size),)

    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> "TargetStream":
        return _TeacherStream(self)

    @torch.inference_mode()
    def embed(self, batch: Batch) -> Tensor:
        """(B, G, D) float32: the teacher's embeddings of the batch's last view set."""
        blur_scale = self.view_size / self.recipe.global_crops[0].size
        images = batch.augment(len(batch.colour) - 1, blur_scale, self._mean, self._std)
        with autocast(self.device, self.precision):
            return self.teacher(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])


class _TeacherStream:
    def __init__(self, branch: OnlineTeacher) -> None:
        self.branch = branch

    def __enter__(self) -> "_TeacherStream":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def next(self, batch: Batch, crops: Sequence[Tensor] = ()) -> Target:
        embedding = self.branch.embed(batch).clone()  # out of inference mode: autograd may save it
        prototypes = self.branch.teacher.prototypes
        return EmbeddingTarget(
            embedding, embedding.new_empty(0, self.branch.space.dim) if prototypes is None else prototypes
        )
