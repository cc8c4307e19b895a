"""Stage 1, top to bottom: run the teacher once over every view that will be asked for, and store what it says.

data.beton -> loader -> augment -> teacher -> encode -> targets.zarr
"""

import time
from dataclasses import replace
from pathlib import Path

from ..common.images.beton import Beton
from ..common.places import local_path
from ..common.run import allow_fast_arithmetic, autocast, choose_precision, pick_device
from ..common.store.manifest import StoreManifest
from ..common.store.reader import TargetStore
from ..common.views.loader import check_loader, resolve_loader
from .asked import (
    TEMPORARY,
    begun_geometry,
    check_asked,
    is_complete,
    manifest_of,
    refuse_what_is_in_the_way,
    temporary_store,
    within_ladder,
)
from .config import CacheConfig
from .cost import CachePlan
from .fitted import with_prototypes, write_logits
from .growth import growth_of, in_its_place
from .job import CacheProgress, StoreJob, Work
from .patches import patch_encoding
from .prototypes import PrototypeConfig
from .share import WAIT, Share, beside
from .teachers import Teacher, load_teacher
from .write import write_store

__all__ = ["CacheConfig", "CachePlan", "CacheProgress", "cache_teacher"]


def cache_teacher(
    config: CacheConfig, progress: CacheProgress | None = None, teacher: Teacher | None = None
) -> StoreManifest:
    """Write the store ``config.out``, going on from the last whole chunk when an earlier run was killed. A complete one is given
    what it lacks: views, or the rows of images that were appended to its data. A ``teacher`` that is given is taken as it is,
    instead of ``config.teacher``'s being loaded.

    Under torchrun all ranks write it together, each with a device of its own, and return when it is whole. With
    ``config.part`` this process makes its part of the shards, and returns; the store is whole once all parts ran.

    Raises MisuseError for settings that cannot be and for a disk that is too small, FailureError when the disk fills up.
    """
    progress = progress or CacheProgress()
    share = Share.of(config.part)
    config = replace(config, out=local_path(config.out))
    device = pick_device(config.device)
    autocast(device, config.precision)  # refuse a wrong precision before anything is loaded
    allow_fast_arithmetic(device, config.precision)
    config = replace(config, precision=choose_precision(device, config.precision))
    check_loader(config.loader, device)
    config = replace(config, loader=resolve_loader(config.loader, device, begun_geometry(config)))
    data = Beton(config.data, config.local_dir)
    progress.say("loading the teacher")
    teacher = (teacher or load_teacher(config.teacher)).to(device)
    check_asked(config, data, teacher)
    patches = patch_encoding(config, data, teacher, progress.note)

    work, embeddings = Work(config, data, teacher, device, progress, share), temporary_store(config)
    num_prototypes = teacher.num_prototypes if embeddings is None else config.prototypes
    manifest = manifest_of(config, config.encoding, patches, data, teacher, num_prototypes)
    if not _grow(work, manifest):
        return manifest
    if embeddings is None:
        whole = _cache(work, manifest)
    else:
        temporary = manifest_of(config, TEMPORARY, patches, data, teacher, teacher.num_prototypes)
        whole = _cache_logits(work, manifest, temporary, embeddings)
    return TargetStore.open(config.out).manifest if whole else manifest


def _grow(work: Work, manifest: StoreManifest) -> bool:
    """Give the complete store ``config.out`` what ``manifest`` has more. False: this worker's share of it is done, and it is not
    whole yet."""
    out, data, prototypes = work.config.out, work.data.manifest, work.config.prototypes
    while (growth := growth_of(out, manifest, data, prototypes)) is not None:
        with in_its_place(growth):
            again = growth_of(out, manifest, data, prototypes)
            if again is None or again.manifest != growth.manifest:
                continue  # another worker put it in its place meanwhile
            if not write_store(work, growth):
                return False
        time.sleep(WAIT)  # for workers that are still at it: the last of them puts it in its place
    return True


def _cache(work: Work, manifest: StoreManifest) -> bool:
    """Embeddings, to which prototypes may be fitted, or a teacher's own logits. False as `write_store`."""
    if not write_store(work, StoreJob(work.config.out, manifest)):
        return False
    if work.config.prototypes:
        _fitted(work, work.config.out)
    return True


def _cache_logits(work: Work, manifest: StoreManifest, temporary: StoreManifest, embeddings: Path) -> bool:
    """Logits of a teacher without a head: its embeddings first, then prototypes fitted on them, then the logits of both."""
    config, note = work.config, work.progress.note
    with beside(config.out, embeddings):
        if is_complete(config.out, manifest, "teacher_temp"):
            return True
        # Refuses what is in the way, before the embeddings are made.
        refuse_what_is_in_the_way(config.out, manifest, work.share, "teacher_temp")
        if not write_store(work, StoreJob(embeddings, temporary)):
            return False
        source = _fitted(work, embeddings)
        note(f"encoding {config.encoding.kind} targets")
        temp = within_ladder(config.encoding, source.manifest.teacher_temp, note)
        manifest = replace(manifest, teacher_temp=temp)
        write_logits(source, config.out, manifest, work.progress.rows, work.device, work.share.of_all())
    return True


def _fitted(work: Work, path: Path) -> TargetStore:
    fitting = PrototypeConfig(work.config.prototypes, seed=work.config.seed)
    return with_prototypes(path, fitting, work.progress.note, work.device, work.progress.fitting, work.share)
