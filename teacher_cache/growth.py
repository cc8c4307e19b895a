"""A complete store that gets more: further views of every image, or the rows of images that were appended to its data.

The grown store is written beside the one there is, as any store is, by one worker or many; what is there already is copied into
it, chunk by chunk, and the teacher runs over what is new. Once it is whole the two change places in one step.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.errors import FailureError, MisuseError
from ..common.files import aside, exchange
from ..common.images.manifest import PackManifest
from ..common.places import Place, hidden_beside, place_of
from ..common.store.begun import half_written
from ..common.store.codec import decode, encode
from ..common.store.encodings import Encoding
from ..common.store.manifest import StoreManifest
from ..common.store.reader import TargetStore
from ..common.store.writer import StoreWriter
from .asked import OF_FITTED, TEMPORARY
from .job import Arrays, StoreJob, Work
from .share import together
from .teachers import Teacher

SUMS = ("embedding_sum", "usage")
"""Statistics that are added up over all views."""


@dataclass(frozen=True)
class Growth(StoreJob):
    """Make ``store`` one of ``manifest``, which has more views or more rows, not both. It is at ``path`` until it is whole."""

    store: TargetStore

    @property
    def note(self) -> str:
        if self.views_there:
            return f"views {self.new_views[0]} to {self.new_views[-1]} are added to the {self.views_there} there"
        return f"rows {self.rows_there:,} to {self.manifest.num_images - 1:,} are added to those there"

    @property
    def views_there(self) -> int:
        """Those that the store has; 0 where it has too few rows, which come first and have no new views."""
        return len(self.store.manifest.view_ids) if self.rows_there == self.manifest.num_images else 0

    @property
    def rows_there(self) -> int:
        return self.store.manifest.num_images

    def bytes_per_view(self, work: Work) -> dict[Path, int]:
        return {self.path: self.manifest.bytes_per_view}

    def chunks_to_copy(self, rows: np.ndarray) -> list[int]:
        size = self.manifest.chunk_rows
        return [] if self.views_there else [int(row) for row in rows[rows % size == 0] if row + size <= self.rows_there]

    def rows_to_run(self, rows: np.ndarray, batch_size: int) -> np.ndarray:
        return rows if self.views_there else rows[rows >= self.rows_there // batch_size * batch_size]

    def new_rows(self, row: int) -> int:
        stop = min(row + self.manifest.chunk_rows, self.manifest.num_images)
        return stop - row if self.views_there else stop - max(row, self.rows_there)

    def chunk_arrays(self, row: int, new: Mapping[str, np.ndarray]) -> Arrays:
        size = self.manifest.chunk_rows
        stop = min(row + size, self.manifest.num_images, self.rows_there)
        if row >= stop:
            return dict(new)
        there = self.store.read(row, stop)
        if not new:
            return there
        axis = 1 if self.views_there else 0
        return {name: np.concatenate([there[name], new[name]], axis) for name in there}

    def zero_statistics(self) -> Arrays:
        return {name: np.zeros_like(self.store.statistics[name]) for name in SUMS if name in self.store.statistics}

    def logits_of(self, teacher: Teacher) -> Callable[[Tensor], Tensor] | None:
        """Also where the store's logits are those of prototypes that were fitted to embeddings, as they were stored."""
        prototypes = self.store.prototypes
        if teacher.prototypes is not None or prototypes is None or not self.store.encoding.needs_logits:
            return super().logits_of(teacher)
        rows = torch.from_numpy(prototypes).to(next(teacher.parameters()).device)
        return lambda embedding: _read_back(TEMPORARY, embedding) @ rows.T

    def of_patches(self, writer: StoreWriter, make: Callable[[], Arrays]) -> Mapping[str, np.ndarray]:
        return self.store.statistics

    def finish(self, writer: StoreWriter, teacher: Teacher, of_patches: Mapping[str, np.ndarray]) -> None:
        """The statistics are those that were there, with the sums over what is new."""
        writer.finish(self.store.prototypes, before=self.store.statistics)


def _read_back(encoding: Encoding, embedding: Tensor) -> Tensor:
    return decode(encoding, encode(encoding, embedding))["embedding"].to(embedding.device)


def growth_of(path: Path, manifest: StoreManifest, data: PackManifest, prototypes: int) -> Growth | None:
    """What of ``manifest`` the complete store at ``path`` is to be given next: rows first, then views. None where there is no
    such store, or ``manifest`` is not of more of the same. ``prototypes`` somebody asked to be fitted, 0 for none.
    """
    _go_on_changing(path)
    if not place_of(path).exists("zarr.json"):
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
    if there.differences(manifest, *may_differ):
        return None
    if not store.place.has_locks:
        _ = store.statistics, store.prototypes  # now, since others may put the grown store in its place at any time
    return Growth(hidden_beside(path, "grown"), manifest, store)


@contextmanager
def in_its_place(growth: Growth) -> Iterator[None]:
    """Inside, workers write the grown store; the last of them to leave puts it where the other one is, once it is whole. In a
    bucket, where they do not see each other, that is whoever finds it whole."""
    grown, place = place_of(growth.path), growth.store.place

    def is_whole() -> bool:
        return grown.exists("zarr.json") and not TargetStore.open(growth.path).manifest.differences(growth.manifest)

    def drop_earlier() -> None:
        """What an earlier growth was killed in dropping, too."""
        if not is_whole() and half_written(grown) is None:
            grown.remove("zarr.json")  # no store any more, whatever is left of it
            grown.remove_all()

    def change_places() -> None:
        grown.remove_all("pending")  # of a worker killed in the very last step
        exchange(growth.path, growth.store.path)
        drop_earlier()

    if place.has_locks:
        with together(growth.store.path, is_whole, change_places, drop_earlier):
            yield
        return
    try:
        drop_earlier()
        yield
        if is_whole():
            _move(grown, place)
    except (MisuseError, FailureError, FileNotFoundError):
        if place.exists("zarr.json") and TargetStore.open(growth.store.path).manifest == growth.store.manifest:
            raise
        # Another worker has put it in its place meanwhile, so that this one did not find what it looked for.


def _go_on_changing(path: Path) -> None:
    """What a worker that was killed while two stores changed places had still to do."""
    place = place_of(path)
    if place.has_locks:
        if not path.exists() and aside(path).exists():  # in three steps
            aside(path).rename(path)
        return
    grown = place_of(hidden_beside(path, "grown"))
    if not grown.exists("zarr.json"):
        return
    if not place.exists("zarr.json"):
        _move(grown, place)
    elif place.read("zarr.json") == grown.read("zarr.json"):
        grown.remove_all()


def _move(grown: Place, place: Place) -> None:
    """The store at ``grown`` comes to ``place``, where there is none until all of it has come.

    Any number of workers may do it, and be killed in it: whoever comes next goes on, as long as there is a manifest at ``grown``.
    """
    try:
        manifest = grown.read("zarr.json")
    except FileNotFoundError:
        return
    if not place.exists("zarr.json") or place.read("zarr.json") != manifest:
        place.remove("zarr.json")
        files = (name for name in grown.names() if name != "zarr.json" and not name.startswith("pending/"))
        # A file that has gone is one that has come: then another worker drops them.
        with suppress(FileNotFoundError), ThreadPoolExecutor(place.at_once) as pool:
            list(pool.map(partial(place.copy_from, grown), files))
        place.write("zarr.json", manifest)
    grown.remove_all()
