"""A teacher's patch targets on their way into the store: what is asked for, the PCA that they are cut by, and their arrays."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from ..common.errors import MisuseError
from ..common.images.beton import Beton
from ..common.patches import CENTRE, KEPT, ROWS, PatchTargets, fit_pca, grid_rows, has_tokens, refuse_few_tokens
from ..common.run import autocast, pick_device
from ..common.store.codec import encode_patches
from ..common.store.patches import AUTO, NONE, USUAL_GRID, PatchChoice, PatchEncoding, resolve_patches
from ..common.views.loader import Batch, ViewLoader, ViewSet
from .asked import begun_manifest
from .config import CacheConfig
from .teachers import Teacher

CALIBRATION_IMAGES = 1024
"""One view each of the first images, which are in random order unless the pack kept theirs: 50,000 tokens of a 7 x 7 grid."""
LOGIT_BYTES = 64 << 20
"""Of patch logits at a time: a batch has thousands of patches."""

AUTO_BYTES = 10**9
"""Of patch targets that nobody asked for: some 150,000 views of 7 x 7 x 128."""

DenseEmbed = Callable[[Batch], tuple[Tensor, Tensor]]


def patch_encoding(
    config: CacheConfig, data: Beton, teacher: Teacher, note: Callable[[str], None]
) -> PatchEncoding | None:
    """The patch targets that ``config`` asks for, by the teacher's map of one empty view; None: it asks for none.

    MisuseError: the teacher has no map, or not what is asked for, or the images have fewer patches than a PCA needs.
    """
    if config.patches.patches == NONE:
        return None
    if config.patches.patches == AUTO:
        return _usual_encoding(config, data, teacher, note)
    device, size = pick_device(config.device), config.view_size or teacher.view_size
    with autocast(device, config.precision):
        features = teacher.with_map(torch.zeros(1, 3, size, size, device=device))[1]
    prototypes = teacher.patch_prototypes
    width, side = features.shape[1], features.shape[2]
    number = 0 if prototypes is None else len(prototypes)
    encoding = resolve_patches(config.patches, f"teacher {teacher.name}", side, width, teacher.dim, number)
    assert encoding is not None
    if not has_tokens(teacher.backbone):
        note(f"teacher {teacher.name} has no patch tokens: its last feature map, {side} x {side}, stands for them")
    if encoding.reduced:
        refuse_few_tokens(encoding.dim, calibration_images(data) * encoding.positions)
    return encoding


def _usual_encoding(
    config: CacheConfig, data: Beton, teacher: Teacher, note: Callable[[str], None]
) -> PatchEncoding | None:
    """A grid where students learn more from one in few steps (``benchmarks/first_run.py``) and it costs little; what is there
    already stays as it is."""
    if (begun := begun_manifest(config)) is not None:
        return begun.patch_encoding
    if config.encoding.kind != "embedding" or config.prototypes or teacher.num_prototypes:
        return None  # students learn from prototypes then
    grid = replace(config, patches=PatchChoice("grid"))
    try:
        found = patch_encoding(grid, data, teacher, lambda text: None)
    except MisuseError:  # a teacher without a map, or too few images for a PCA
        return None
    assert found is not None
    if found.grid < USUAL_GRID:
        return None
    size = data.num_images * config.views * found.bytes_per_view
    if size > AUTO_BYTES:
        note(f"without targets of patches, which would take {decimal(size)} more: `patches` grid caches them")
        return None
    note("with targets of patches, from which students learn more in few steps: `patches` none leaves them out")
    return found


def calibration_images(data: Beton) -> int:
    return min(CALIBRATION_IMAGES, data.num_images)


def fixed_arrays(
    encoding: PatchEncoding,
    config: CacheConfig,
    data: Beton,
    teacher: Teacher,
    view_size: int,
    embed: DenseEmbed,
    note: Callable[[str], None],
) -> dict[str, np.ndarray]:
    """What the store keeps of patches besides their rows: a PCA fitted in a first pass over some images, or what the teacher's
    file has of its own for patches."""
    if encoding.kind != "grid":
        own = {ROWS: teacher.own_patch_prototypes, CENTRE: teacher.patch_centre}
        return {name: values.cpu().numpy() for name, values in own.items() if values is not None}
    if not encoding.reduced:
        return {}

    def tokens() -> Iterator[Tensor]:
        loader = ViewLoader(data, config.recipe, config.seed, config.loader)
        for batch in loader.epoch(np.arange(calibration_images(data)), [ViewSet((0,), view_size)]):
            yield grid_rows(embed(batch)[1].flatten(0, 1), encoding.grid).flatten(0, 1)

    fitted = fit_pca(tokens(), encoding.dim)
    note(
        f"patch tokens: {encoding.dim} of {encoding.width} components keep {float(fitted[KEPT]):.1%} of their variance, by a "
        f"view each of {calibration_images(data):,} images"
    )
    return fitted


def with_patches(
    encoding: PatchEncoding, teacher: Teacher, embed: DenseEmbed, fixed: Mapping[str, np.ndarray], device: torch.device
) -> Callable[[Batch], tuple[Tensor, dict[str, np.ndarray]]]:
    """From a batch to its embeddings (B, V, D) and the store's arrays of its patch targets, (B, V, P, ...)."""
    targets = PatchTargets(encoding, teacher.head, teacher.patch_prototypes, fixed, device)

    def run_teacher(batch: Batch) -> tuple[Tensor, dict[str, np.ndarray]]:
        embedding, features = embed(batch)
        return embedding, patch_arrays(targets, features)

    return run_teacher


def patch_arrays(targets: PatchTargets, features: Tensor) -> dict[str, np.ndarray]:
    """Maps (B, V, C, h, w) to the store's arrays of them, (B, V, P, ...)."""
    encoding = targets.encoding
    rows = targets.rows(features.flatten(0, 1))
    if encoding.kind == "prototypes":
        at_once = max(1, LOGIT_BYTES // (4 * encoding.positions * encoding.num_prototypes))
        parts = [encode_patches(encoding, part, targets.logits(part)) for part in rows.split(at_once)]
    else:
        parts = [encode_patches(encoding, rows)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: values.reshape(*features.shape[:2], *values.shape[1:]) for name, values in joined.items()}
