"""How tests/test_pinned.py reaches the code: its one file that may follow a renaming. It has no expectations."""

from pathlib import Path

import conftest  # noqa: F401  (one thread, and no network, before torch works)
import numpy as np
import torch
from typer.testing import CliRunner

from rob.cli import app
from rob.common.images.beton import Beton
from rob.common.store.codec import decode
from rob.common.store.reader import TargetStore
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import LOCAL, view_parameters
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet, ffcv_backend
from rob.common.views.recipes import RECIPES

FIRST_LOCAL_ID = LOCAL
HAS_COMPILED_LOADER = ffcv_backend is not None


def rob(*arguments: object) -> str:
    """The command line in this process; what it prints. Its own errors come through."""
    outcome = CliRunner().invoke(app, [*map(str, arguments)])
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def drawn(
    recipe: str, seed: int, image_ids: np.ndarray, view_ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(..., 5) int geometry and (..., 8) float colour of the views; the arrays broadcast."""
    return tuple(view_parameters(RECIPES[recipe], seed, image_ids, view_ids, heights, widths))


def network_inputs(
    data: Path, recipe: str, seed: int, loader: str, sets: list[tuple[tuple[int, ...], int]], normal: tuple
) -> list[np.ndarray]:
    """Of all images in order: for each (view ids, size) of ``sets``, global ones first, (N, n, 3, size, size) float32."""
    drawing, packed, (mean, std) = RECIPES[recipe], Beton(data), map(torch.tensor, normal)
    loading = ViewLoader(packed, drawing, seed, LoaderConfig(loader, batch_size=packed.num_images, workers=1))
    crops = drawing.global_crops[0], drawing.local_crop
    inputs = []
    for batch in loading.epoch(np.arange(packed.num_images), [ViewSet(*views) for views in sets]):
        for number, (_, size) in enumerate(sets):
            inputs.append(batch.augment(number, size / crops[number].size, mean, std).numpy())
    return inputs


def augmented(images: np.ndarray, colour: np.ndarray, blur_scale: float, normal: tuple) -> np.ndarray:
    """(N, 3, S, S) uint8 images with (N, 8) colour parameters as a network takes them."""
    mean, std = map(torch.tensor, normal)
    return apply_colours(torch.from_numpy(images), torch.from_numpy(colour), blur_scale, mean, std).numpy()


def stored_targets(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None, dict[str, np.ndarray]]:
    """Of a store: the decoded arrays of all rows, the prototypes, the statistics."""
    store = TargetStore.open(path)
    arrays = decode(store.encoding, store.read(0, store.manifest.num_images))
    return {name: values.numpy() for name, values in arrays.items()}, store.prototypes, store.statistics
