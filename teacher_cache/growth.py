"""A complete store that gets more: further views of every image, or the rows of images that were appended to its data.

The grown store is written beside the one there is, as any store is, by one worker or many; what is there already is copied into
it, chunk by chunk, and the teacher runs over what is new. Once it is whole the two change places in one step.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.files import aside, exchange
from ..common.images.manifest import PackManifest
from ..common.places import Folder, is_address
from ..common.store.begun import half_written
from ..common.store.codec import decode, encode
from ..common.store.encodings import Encoding
from ..common.store.manifest import StoreManifest
from ..common.store.reader import TargetStore
from .share import together

Arrays = dict[str, np.ndarray]
OF_FITTED = ("num_prototypes", "head", "teacher_temp")
"""What a store has of the prototypes that were fitted to it, and nobody asks for."""
SUMS = ("embedding_sum", "usage")
"""Statistics that are added up over all views."""


@dataclass(frozen=True)
class Growth:
    """``store`` becomes one of ``manifest``, which has more views or more rows, not both."""

    store: TargetStore
    manifest: StoreManifest

    @property
    def path(self) -> Path:
        """Where the grown store is written."""
        return self.store.path.with_name(f".{self.store.path.name}.grown")

    @property
    def views_there(self) -> int:
        """Of the views asked for, those that the store has, unless it has too few rows: then none of the new ones."""
        return len(self.store.manifest.view_ids) if self.rows_there == self.manifest.num_images else 0

    @property
    def rows_there(self) -> int:
        return self.store.manifest.num_images

    @property
    def new_views(self) -> tuple[int, ...]:
        """That the teacher is to see."""
        return self.manifest.view_ids[self.views_there :]

    @property
    def says(self) -> str:
        if self.views_there:
            return f"views {self.new_views[0]} to {self.new_views[-1]} are added to the {self.views_there} there"
        return f"rows {self.rows_there:,} to {self.manifest.num_images - 1:,} are added to those there"

    def kept(self, rows: np.ndarray) -> list[int]:
        """Of ``rows``, the first ones of chunks that are copied as they are."""
        size = self.manifest.chunk_rows
        return [] if self.views_there else [int(row) for row in rows[rows % size == 0] if row + size <= self.rows_there]

    def made(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        """Of ``rows``, those that the teacher sees: from the beginning of a batch on."""
        return rows if self.views_there else rows[rows >= self.rows_there // batch_size * batch_size]

    def new_rows(self, row: int) -> int:
        """Of the chunk at ``row``, how many are new in whole or in part."""
        stop = min(row + self.manifest.chunk_rows, self.manifest.num_images)
        return stop - row if self.views_there else stop - max(row, self.rows_there)

    def merged(self, row: int, new: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays of the chunk at ``row``: of the store, and the ``new`` ones of its `new_rows`, if any."""
        size = self.manifest.chunk_rows
        stop = min(row + size, self.manifest.num_images, self.rows_there)
        if row >= stop:
            return dict(new)
        there = self.store.read(row, stop)
        if not new:
            return there
        axis = 1 if self.views_there else 0
        return {name: np.concatenate([there[name], new[name]], axis) for name in there}

    def no_statistics(self) -> Arrays:
        """Of a chunk that is copied."""
        return {name: np.zeros_like(self.store.statistics[name]) for name in SUMS if name in self.store.statistics}

    def statistics(self, new: Mapping[str, np.ndarray]) -> Arrays:
        """Those of the grown store, of which ``new`` are the sums over what is new."""
        there = self.store.statistics
        return {name: there[name] + new[name] if name in new else there[name] for name in there}

    def logits_of(self, device: torch.device, stored_as: Encoding) -> Callable[[Tensor], Tensor] | None:
        """Of embeddings, where the store's logits are those of prototypes that were fitted to embeddings ``stored_as`` this."""
        prototypes = self.store.prototypes
        if self.store.manifest.head != "fitted" or prototypes is None or not self.store.encoding.needs_logits:
            return None
        rows = torch.from_numpy(prototypes).to(device)
        return lambda embedding: _read_back(stored_as, embedding) @ rows.T


def _read_back(encoding: Encoding, embedding: Tensor) -> Tensor:
    return decode(encoding, encode(encoding, embedding))["embedding"].to(embedding.device)


def growth_of(path: Path, manifest: StoreManifest, data: PackManifest, prototypes: int) -> Growth | None:
    """What of ``manifest`` the complete store at ``path`` is to be given next: rows first, then views. None where there is no
    such store, or ``manifest`` is not of more of the same. ``prototypes`` somebody asked to be fitted, 0 for none.
    """
    if is_address(path):
        return None  # nothing in a bucket can change places
    if not path.exists() and aside(path).exists():  # killed while two stores changed places in three steps
        aside(path).rename(path)
    if not (path / "zarr.json").exists():
        return None
    store = TargetStore.open(path)
    there = store.manifest
    if there.head == "fitted":
        if prototypes not in (0, there.num_prototypes):
            return None
        manifest = replace(manifest, **{name: getattr(there, name) for name in OF_FITTED})
    more_rows = (there.num_images, there.data_fingerprint) in data.grown
    more_views = there.view_ids != manifest.view_ids and there.view_ids == manifest.view_ids[: len(there.view_ids)]
    if more_rows:
        manifest = replace(manifest, view_ids=there.view_ids)
    elif not more_views:
        return None
    may_differ = ("view_ids", *(("num_images", "data_fingerprint") if more_rows else ()))
    return Growth(store, manifest) if _alike(there, manifest, *may_differ) else None


def _alike(one: StoreManifest, other: StoreManifest, *may_differ: str) -> bool:
    left_out = {"versions", *may_differ}
    values = ({k: v for k, v in manifest.to_json().items() if k not in left_out} for manifest in (one, other))
    return next(values) == next(values)


@contextmanager
def in_its_place(growth: Growth) -> Iterator[None]:
    """Inside, workers write the grown store; the last of them to leave puts it where the other one is, once it is whole."""
    grown = growth.path

    def is_whole() -> bool:
        return (grown / "zarr.json").exists() and _alike(TargetStore.open(grown).manifest, growth.manifest)

    def change_places() -> None:
        shutil.rmtree(grown / "pending", ignore_errors=True)  # of a worker killed in the very last step
        exchange(grown, growth.store.path)
        drop_earlier()

    def drop_earlier() -> None:
        """What an earlier growth was killed in dropping, too."""
        if grown.exists() and not is_whole() and half_written(Folder(grown)) is None:
            (grown / "zarr.json").unlink(missing_ok=True)  # no store any more, whatever is left of it
            shutil.rmtree(grown)

    with together(growth.store.path, is_whole, change_places, drop_earlier):
        yield
