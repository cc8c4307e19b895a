"""Targets from a store that ``rob cache-teacher`` wrote."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...common.errors import MisuseError
from ...common.factories import is_factory
from ...common.images.beton import Beton
from ...common.patches import CENTRE, ROWS
from ...common.settings import check
from ...common.store.encodings import PATCHES, Encoding
from ...common.store.patches import PatchEncoding
from ...common.store.prefetch import TargetPrefetcher, window_blocks
from ...common.store.reader import TargetStore
from ...common.tokens import is_dinov3
from ...common.views.batch import Batch
from ...common.views.recipes import Recipe, with_local_crops
from ..kernels.target import DenseTarget, EmbeddingTarget, Target, TopKTarget
from .branch import RunContext, TargetBranch
from .config import CacheInMemory, WindowMib
from .dense import Placement, TargetWithPatches
from .pairing import ViewPlan
from .space import PatchSpace, TargetSpace

WINDOW_BLOCKS = 16
"""Blocks of 256 images within which an epoch's order is shuffled, unless the memory for targets holds fewer."""


@dataclass(frozen=True)
class Cached:
    """The store at ``path``. ``window_mib`` bounds the memory of decompressed targets; ``cache_in_memory`` keeps all of them
    from epoch to epoch instead.

    No target shows a local crop, so these may be other than the store's recipe has them: those of ``recipe``, where it has
    some, with the weight of its global pairs, and of ``local_scale``, their least and largest share of the image.
    """

    path: Path
    window_mib: WindowMib = 256
    cache_in_memory: CacheInMemory = False
    recipe: Recipe | None = None
    local_scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def stores(self) -> tuple[Path, ...]:
        return (self.path,)

    def open(self, run: RunContext) -> "CachedTargets":
        """MisuseError: the store is of another data set, or its recipe has no local crops to scale."""
        return CachedTargets(self, run)

    def as_drawn(self, stored: Recipe) -> Recipe:
        """The ``stored`` recipe with the local crops asked for."""
        local, global_weight = stored.local_crop, stored.global_weight
        if self.recipe is not None and self.recipe.local_crop is not None:
            local, global_weight = self.recipe.local_crop, self.recipe.global_weight
        if self.local_scale is not None:
            if local is None:
                raise MisuseError(
                    f"`local_scale`: the recipe {stored.name} of the store {self.path} has no local crops: leave it out, or "
                    f"cache with {' or '.join(with_local_crops())}"
                )
            local = replace(local, scale=tuple(self.local_scale), centre=0.0)
        return replace(stored, local_crop=local, global_weight=global_weight)


class CachedTargets(TargetBranch):
    """The targets of a store, read ahead."""

    kind = "cached"

    def __init__(self, config: Cached, run: RunContext) -> None:
        self.config, self.device = config, run.device
        self.store, self.data = TargetStore.open(config.path), run.data
        self.store.check_data(run.data.manifest)
        self.has_grid = self.store.patches is not None and self.store.patches.kind == "grid"
        self.reads_patches = self.store.patches is not None and run.reads_patches
        if not self.reads_patches:
            self.store = self.store.pooled()
        manifest = self.store.manifest
        dinov3 = is_dinov3(manifest.teacher) and not is_factory(manifest.teacher)
        if manifest.pooling is None and manifest.head in ("none", "fitted") and dinov3:
            raise MisuseError(
                f"{config.path} holds the mean of {manifest.teacher}'s patch tokens, as rob cached DINOv3 before it took the "
                "class token: cache the targets again"
            )
        self.recipe = config.as_drawn(Recipe.from_dict(manifest.recipe))
        self.seed, self.views, self.geometry = manifest.seed, len(manifest.view_ids), manifest.geometry
        self.window_blocks = min(WINDOW_BLOCKS, window_blocks(self.store, config.window_mib))
        self._prefetcher: TargetPrefetcher | None = None
        self.space = space_of(self.store, run.device)
        self.source = str(self.store.place)
        told = ("teacher", "weights_hash", "head", "num_prototypes", "view_size", "precision", "geometry", "encoding")
        stored = vars(manifest)
        self.description = {
            "kind": self.kind,
            **{name: stored[name] for name in told},
            "views": self.views,
            "seed": self.seed,
            "window_mib": config.window_mib,
        }

    @property
    def usual_objective(self) -> str:
        return "patch" if self.has_grid and not self.space.num_prototypes else super().usual_objective

    @contextmanager
    def targets(
        self, order: np.ndarray, batch_size: int, plan: ViewPlan
    ) -> Iterator[Callable[..., Target | TargetWithPatches]]:
        prefetcher = self._prefetch(batch_size)
        prefetcher.columns = np.array(plan.targets)
        batches = prefetcher.epoch(order)

        def target(batch: Batch, crops: Sequence[Tensor] = ()) -> Target | TargetWithPatches:
            ready = next(batches)
            assert np.array_equal(ready.image_ids, batch.image_ids), "the loader and the store read the same order"
            pooled = self.make_target(ready.targets)
            if not self.reads_patches:
                return pooled
            placement = placed(batch.image_ids, self.data, plan, self.recipe, self.seed)
            return TargetWithPatches(pooled, self.make_patches(ready.targets), placement)

        try:
            yield target
        finally:
            prefetcher.close()

    def _prefetch(self, batch_size: int) -> TargetPrefetcher:
        """One for all epochs: it may keep targets in memory."""
        if self._prefetcher is None or self._prefetcher.batch_size != batch_size:
            window, in_memory = self.config.window_mib, self.config.cache_in_memory
            self._prefetcher = TargetPrefetcher(
                self.store, batch_size, window_mib=window, device=self.device, cache_in_memory=in_memory
            )
        return self._prefetcher

    def make_target(self, arrays: dict[str, Tensor]) -> Target:
        """Decoded arrays (B, G, ...) of the store as the loss takes them."""
        return stored_target(self.store.encoding, arrays, self.space.prototypes, self.space.num_prototypes)

    def make_patches(self, arrays: dict[str, Tensor]) -> Target:
        """The same of its patch targets, (B, G * P, ...)."""
        encoding = self.store.patches
        assert encoding is not None
        own = {n.removeprefix(PATCHES): a.flatten(1, 2) for n, a in arrays.items() if n.startswith(PATCHES)}
        return stored_target(encoding.of_one, own, self.patch_prototypes, encoding.num_prototypes)

    @cached_property
    def patch_prototypes(self) -> Tensor | None:
        """(K, D) of a patch's embedding; None: patches are not for prototypes."""
        assert self.store.patches is not None
        if self.store.patches.kind == "grid":
            return None
        own = self.store.statistics.get(ROWS)
        return self.space.prototypes if own is None else torch.from_numpy(own).to(self.device)


def placed(image_ids: np.ndarray, data: Beton, plan: ViewPlan, recipe: Recipe, seed: int) -> Placement:
    """Where the views of ``plan`` are on some images."""
    return Placement(image_ids, data.heights[image_ids], data.widths[image_ids], plan, recipe, seed)


def patch_space(encoding: PatchEncoding, centre: Tensor | None) -> PatchSpace:
    """What patch targets that are stored so are made of."""
    tail = encoding.kind == "prototypes" and encoding.k < encoding.num_prototypes
    ladder = encoding.of_one.temps if tail else None
    return PatchSpace(encoding.kind, encoding.grid, encoding.dim, encoding.num_prototypes, ladder, centre)


def space_of(store: TargetStore, device: torch.device) -> TargetSpace:
    """What the targets of ``store`` are made of, on ``device``."""
    manifest, encoding, statistics = store.manifest, store.encoding, store.statistics
    prototypes = None if store.prototypes is None else torch.from_numpy(store.prototypes).to(device)
    centre, patch_centre = (
        torch.from_numpy(statistics[name]).to(device) if name in statistics else None for name in ("centre", CENTRE)
    )
    has_tail = encoding.kind == "topk" and encoding.k < manifest.num_prototypes
    mean = statistics["embedding_sum"] / (manifest.num_images * len(manifest.view_ids))
    mean = torch.from_numpy(mean).float().to(device)
    return TargetSpace(
        manifest.dim,
        manifest.num_prototypes,
        has_embedding=encoding.kind == "embedding",
        teacher_temp=manifest.teacher_temp,
        mean_embedding=mean,
        # Logits are linear in the embedding: their mean is that of the mean embedding.
        mean_logits=None if prototypes is None else prototypes @ mean,
        centre=centre,
        prototypes=prototypes,
        has_all_logits=encoding.kind != "topk",
        ladder=encoding.temps if has_tail else None,
        patches=None if store.patches is None else patch_space(store.patches, patch_centre),
    )


def stored_target(
    encoding: Encoding, arrays: Mapping[str, Tensor], prototypes: Tensor | None, num_prototypes: int
) -> Target:
    """What decoded arrays (B, G, ...) of a store say, with the store's K ``prototypes`` where it has some."""
    match encoding.kind:
        case "embedding":
            return EmbeddingTarget(arrays["embedding"], prototypes)
        case "topk":
            return TopKTarget(arrays["ids"], arrays["logits"], arrays["tail"], encoding.temps, num_prototypes)
        case _:
            return DenseTarget(arrays["logits"])
