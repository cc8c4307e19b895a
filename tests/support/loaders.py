"""Views by image, as a loader gives them."""

import numpy as np
import pytest
import torch

from rob.common.views import loader as loader_module
from rob.common.views.drawing import LOCAL
from rob.common.views.loader import ViewLoader, ViewSet
from rob.common.views.recipes import get_recipe

needs_ffcv = pytest.mark.skipif(loader_module.ffcv_backend is None, reason="ffcv is not installed")
BACKENDS = [pytest.param("ffcv", marks=needs_ffcv), "torch"]
DINO = get_recipe("dino")
SETS = (ViewSet((0, 1), 32), ViewSet((LOCAL, LOCAL + 1, LOCAL + 7), 16))


def views_by_image(loader: ViewLoader, order, sets=SETS) -> dict[int, list[torch.Tensor]]:
    """Of each image its views and colours, cloned out of the batches."""
    seen = {}
    for batch in loader.epoch(np.asarray(order), sets):
        for b, image_id in enumerate(batch.image_ids.tolist()):
            assert image_id not in seen
            seen[image_id] = [tensor[b].clone() for tensor in (*batch.views, *batch.colour)]
    return seen


def assert_same(a: dict[int, list[torch.Tensor]], b: dict[int, list[torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    for image_id, tensors in a.items():
        for x, y in zip(tensors, b[image_id], strict=True):
            assert torch.equal(x, y), f"image {image_id}"


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean().clamp(min=1e-9)))
