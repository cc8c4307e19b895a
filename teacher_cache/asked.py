"""The store that is asked for, and what of it is there already."""

from collections.abc import Callable
from pathlib import Path

from ..common.errors import MisuseError
from ..common.images.beton import Beton
from ..common.places import hidden_beside, place_of, shown
from ..common.run import versions
from ..common.store.begun import begun_store, drop_leftovers, half_written
from ..common.store.encodings import PATCHES, Encoding
from ..common.store.manifest import StoreManifest
from ..common.store.patches import PatchEncoding
from ..common.store.reader import TargetStore
from ..common.store.shards import LARGEST_CHUNK
from ..common.views.loader import geometry
from .config import CacheConfig
from .prototypes import refuse_unsuitable
from .share import Share
from .teachers import Teacher

OF_FITTED = ("num_prototypes", "head", "teacher_temp")
"""What a store has of the prototypes that were fitted to it, and nobody asks for."""
TEMPORARY = Encoding("embedding", dtype="float16")
"""Of the embeddings that lie beside a store of logits until prototypes are fitted to them."""


def begun_geometry(config: CacheConfig) -> str | None:
    """Of the views in what is there already."""
    begun = begun_manifest(config)
    return begun and begun.geometry


def begun_manifest(config: CacheConfig) -> StoreManifest | None:
    """Of what is there already, whole or begun: it goes on as it began."""
    for path in (config.out, temporary_store(config)):
        if path is None:
            continue
        if (place := place_of(path)).exists("zarr.json"):
            return TargetStore.open(path).manifest
        if begun := half_written(place):
            return begun
    return None


def temporary_store(config: CacheConfig) -> Path | None:
    """Where the embeddings lie that prototypes are fitted to, when the store itself is to hold only logits."""
    needed = config.prototypes and config.encoding.needs_logits
    return hidden_beside(config.out, "embeddings") if needed else None


def check_asked(config: CacheConfig, data: Beton, teacher: Teacher) -> None:
    if config.prototypes and teacher.num_prototypes:
        raise MisuseError(
            f"teacher {teacher.name} has {teacher.num_prototypes} prototypes of its own: leave out `prototypes`"
        )
    if config.encoding.needs_logits and not (teacher.num_prototypes or config.prototypes):
        raise MisuseError(
            f"`encoding` {config.encoding.kind} needs prototype logits, but teacher {teacher.name} has no head: "
            "give a number of `prototypes` to fit, or use `encoding` embedding"
        )
    if config.prototypes:
        refuse_unsuitable(config.prototypes, data.num_images * config.views)


def manifest_of(
    config: CacheConfig,
    encoding: Encoding,
    patches: PatchEncoding | None,
    data: Beton,
    teacher: Teacher,
    num_prototypes: int,
) -> StoreManifest:
    """MisuseError: its chunks would be larger than their codec takes."""
    manifest = StoreManifest(
        data_fingerprint=data.manifest.fingerprint,
        num_images=data.num_images,
        recipe=config.recipe.to_dict(),
        seed=config.seed,
        view_ids=tuple(range(config.views)),
        view_size=config.view_size or teacher.view_size,
        teacher=teacher.name,
        weights_hash=teacher.weights_hash,
        pooling=teacher.pooling,
        head="fitted" if config.prototypes and num_prototypes else teacher.head_name,
        dim=teacher.dim,
        num_prototypes=num_prototypes,
        teacher_temp=teacher.teacher_temp,
        encoding=encoding.to_dict(),
        patches=None if patches is None else patches.to_dict(),
        precision=config.precision,
        geometry=geometry(config.loader),
        versions=versions("rob", "torch", "timm", "zarr", "numcodecs"),
    )
    for name, array in manifest.arrays().items():
        if array.chunk_bytes > LARGEST_CHUNK:
            less = (
                "fewer `views`, or a smaller `patch_grid` or `patch_dim`"
                if name.startswith(PATCHES)
                else "fewer `views`"
            )
            raise MisuseError(
                f"{config.views} views of {manifest.chunk_rows} images have {array.chunk_bytes / 1e9:,.1f} GB of {name!r}, and "
                f"{LARGEST_CHUNK / 1e9:,.1f} GB can be written at once: take {less}"
            )
    return manifest


def is_complete(path: Path, manifest: StoreManifest, *may_differ: str) -> bool:
    """Whether ``path`` is a finished store of exactly this, from which what a killed writer left is removed. MisuseError: it is
    a finished store of something else."""
    if not (place := place_of(path)).exists("zarr.json"):
        return False
    if different := TargetStore.open(path).manifest.differences(manifest, *may_differ):
        raise MisuseError(
            f"{shown(path)} is already there and complete, with other settings ({different}): give another path, or delete it "
            "first"
        )
    drop_leftovers(place)
    return True


def refuse_what_is_in_the_way(path: Path, manifest: StoreManifest, share: Share, *may_differ: str) -> None:
    """MisuseError where the store of ``manifest`` cannot be begun or gone on with at ``path``. Others may finish it any time."""
    try:
        begun_store(place_of(path), manifest, *may_differ)
    except (MisuseError, FileNotFoundError):  # also of what lay under pending/ a moment ago
        if share.split is None or not is_complete(path, manifest, *may_differ):
            raise


def bytes_per_view_of(config: CacheConfig, teacher: Teacher, patches: PatchEncoding | None) -> dict[Path, int]:
    """Before compression, of the store and of the temporary one beside it, if there is one."""
    stores = {config.out: config.encoding}
    if (temporary := temporary_store(config)) is not None:
        stores[temporary] = TEMPORARY
    num_prototypes = teacher.num_prototypes or config.prototypes
    beside = 0 if patches is None else patches.bytes_per_view
    return {path: encoding.bytes_per_view(teacher.dim, num_prototypes) + beside for path, encoding in stores.items()}


def within_ladder(encoding: Encoding, temp: float | None, note: Callable[[str], None]) -> float | None:
    """The nearest temperature that a store of this encoding can be read at."""
    if temp is None or encoding.kind != "topk":
        return temp
    nearest = min(max(temp, min(encoding.temps)), max(encoding.temps))
    if nearest != temp:
        note(
            f"teacher temperature {nearest:g}, as the tail of topk targets is kept at {min(encoding.temps):g} to {nearest:g}"
        )
    return nearest
