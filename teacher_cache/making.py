"""What the teacher has to make of a store, and what every step of that goes by."""

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
    """What a caller may show, each of which may be left out: the plan, the rows done, notes, the batches that prototypes were
    fitted to, and what is being waited for."""

    plan: Callable[[CachePlan], None] = lambda plan: None
    rows: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None
    fitting: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Work:
    """What is asked for, settled; the images, the teacher on its device, and this worker's share."""

    config: CacheConfig
    data: Beton
    teacher: Teacher
    device: torch.device
    progress: CacheProgress
    share: Share


@dataclass(frozen=True)
class Making:
    """A store of ``manifest`` at ``path``, of which the teacher makes everything. `growth.Growth` has another one's rows or views
    to begin with."""

    path: Path
    manifest: StoreManifest

    @property
    def says(self) -> str | None:
        """Worth a note, at the beginning."""
        return None

    @property
    def views_there(self) -> int:
        """Of the views asked for, those that need no teacher."""
        return 0

    @property
    def rows_there(self) -> int:
        return 0

    @property
    def new_views(self) -> tuple[int, ...]:
        """That the teacher is to see."""
        return self.manifest.view_ids[self.views_there :]

    def bytes_per_view(self, work: Work) -> dict[Path, int]:
        """Before compression, of each store that is being made."""
        return bytes_per_view_of(work.config, work.teacher, self.manifest.patch_encoding)

    # ==== of a chunk ====

    def kept(self, rows: np.ndarray) -> list[int]:
        """Of ``rows``, the first ones of chunks that are copied as they are."""
        return []

    def made(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Of ``rows``, those that the teacher sees: from the beginning of a batch on."""
        return rows

    def new_rows(self, row: int) -> int:
        """Of the chunk at ``row``, how many are new in whole or in part."""
        return min(self.manifest.chunk_rows, self.manifest.num_images - row)

    def merged(self, row: int, new: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays of the chunk at ``row``: what is there, and the ``new`` ones of its `new_rows`, if any."""
        return dict(new)

    def no_statistics(self) -> Arrays:
        """Of a chunk that is copied."""
        return {}

    def logits_of(self, teacher: Teacher) -> Callable[[Tensor], Tensor] | None:
        """What becomes of embeddings (rows, V, D) on the teacher's device; None: they have no logits."""
        return None if teacher.prototypes is None else teacher.logits

    # ==== of all ====

    def of_patches(self, writer: StoreWriter, make: Callable[[], Arrays]) -> Mapping[str, np.ndarray]:
        """What the store keeps of patches besides their rows, made once."""
        return writer.kept("patches", make)

    def finish(self, writer: StoreWriter, teacher: Teacher, of_patches: Mapping[str, np.ndarray]) -> None:
        more = dict(of_patches) if teacher.centre is None else {**of_patches, "centre": teacher.centre.cpu().numpy()}
        writer.finish(None if teacher.prototypes is None else teacher.prototypes.cpu().numpy(), more)
