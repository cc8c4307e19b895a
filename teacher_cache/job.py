"""A store to be made, and what making it takes: the settings, the images, the teacher and this worker's share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.images.beton import Beton
from ..common.store.manifest import StoreManifest
from ..common.store.writer import StoreWriter
from .asked import bytes_per_view_of
from .config import CacheConfig
from .cost import CachePlan
from .share import Share
from .teachers import Teacher

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CacheProgress:
    """What a caller may show; each may be left out: the plan, the rows that are written, how many images the teacher has seen
    since it was last called, notes, the batches that prototypes were fitted to, and what is being waited for."""

    plan: Callable[[CachePlan], None] = lambda plan: None
    rows: Callable[[int, int], None] = lambda done, total: None
    seen: Callable[[int], None] = lambda images: None
    note: Callable[[str], None] = lambda text: None
    fitting: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Work:
    """The settings, with nothing left at ``auto``; the images, the teacher on its device, and this worker's share."""

    config: CacheConfig
    data: Beton
    teacher: Teacher
    device: torch.device
    progress: CacheProgress
    share: Share


@dataclass(frozen=True)
class StoreJob:
    """Make the store of ``manifest`` at ``path``, all of it by the teacher. `growth.Growth` begins with the rows or views of
    another store."""

    path: Path
    manifest: StoreManifest

    @property
    def note(self) -> str | None:
        """What to tell the user first."""
        return None

    @property
    def views_there(self) -> int:
        """How many of the views are there already."""
        return 0

    @property
    def rows_there(self) -> int:
        """How many of the rows are there already."""
        return 0

    @property
    def new_views(self) -> tuple[int, ...]:
        """Ids of the views that the teacher has to see."""
        return self.manifest.view_ids[self.views_there :]

    def bytes_per_view(self, work: Work) -> dict[Path, int]:
        """Before compression, of each store that is being made."""
        return bytes_per_view_of(work.config, work.teacher, self.manifest.patch_encoding)

    # ==== of a chunk ====

    def chunks_to_copy(self, rows: np.ndarray) -> list[int]:
        """The first rows of those chunks of ``rows`` that are copied as they are."""
        return []

    def rows_to_run(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Those of ``rows`` that the teacher has to see, from the beginning of a batch on."""
        return rows

    def new_rows(self, row: int) -> int:
        """How many rows of the chunk at ``row`` are new, in whole or in part."""
        return min(self.manifest.chunk_rows, self.manifest.num_images - row)

    def chunk_arrays(self, row: int, new: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays of the chunk at ``row``: what is there already, and ``new``, those of its `new_rows`."""
        return dict(new)

    def zero_statistics(self) -> Arrays:
        """What a chunk that is copied adds to the statistics."""
        return {}

    def logits_of(self, teacher: Teacher) -> Callable[[Tensor], Tensor] | None:
        """From embeddings (rows, V, D) on the teacher's device to logits (rows, V, K); None: they have none."""
        return None if teacher.prototypes is None else teacher.logits

    # ==== of all ====

    def of_patches(self, writer: StoreWriter, make: Callable[[], Arrays]) -> Mapping[str, np.ndarray]:
        """What the store keeps of patches besides their rows; ``make`` is called by one worker only."""
        return writer.kept("patches", make)

    def finish(self, writer: StoreWriter, teacher: Teacher, of_patches: Mapping[str, np.ndarray]) -> None:
        more = dict(of_patches) if teacher.centre is None else {**of_patches, "centre": teacher.centre.cpu().numpy()}
        writer.finish(None if teacher.prototypes is None else teacher.prototypes.cpu().numpy(), more)
