"""The view kernels on a GPU, against plain torch."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux package")
pytest.importorskip("rob.common.views.decode", reason="ffcv is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and pytest -m gpu", allow_module_level=True)

from rob.common.views.colours import apply_colours
from rob.common.views.drawing import LOCAL
from rob.common.views.kernel import views_from_planes
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.planes import Planes
from rob.common.views.recipes import get_recipe
from rob.common.views.reference import views_from_planes as reference
from support.view_cases import JITTERS, MEAN, STD, batch_of_two, neutral, stored_photograph

CUDA = torch.device("cuda")
pytestmark = pytest.mark.gpu


def both(planes: Planes, first: int, size: int, colour: torch.Tensor, dtype: torch.dtype):
    exact = reference(planes, first, size, colour, 0.8, MEAN, STD, torch.float32)
    ours = views_from_planes(planes.to(CUDA), first, size, colour, 0.8, MEAN.to(CUDA), STD.to(CUDA), dtype)
    return ours.cpu(), exact


@pytest.mark.parametrize("name", JITTERS)
@pytest.mark.parametrize("size", [37, 96, 224])
def test_as_the_reference(name, size):
    planes, colour = stored_photograph(JITTERS[name])
    ours, exact = both(planes, 0, size, colour, torch.float32)
    error = (ours - exact).abs() * STD.view(3, 1, 1) * 255
    assert error.mean() < 0.1
    assert (error > 0.5).float().mean() < 2e-3


def test_some_views_of_several_images_in_bfloat16():
    ours, exact = both(*(batch := batch_of_two())[:1], 1, 17, batch[1], torch.bfloat16)
    assert float((ours.float() - exact).abs().max()) < 0.03


@pytest.mark.parametrize("size", [37, 96, 224])
def test_colours_of_resized_views_are_those_of_the_cpu(size):
    colour = torch.cat([neutral(1, **columns)[0] for columns in JITTERS.values()])
    images = torch.randint(0, 256, (len(colour), 3, size, size), dtype=torch.uint8)
    exact = apply_colours(images, colour, 0.8, MEAN, STD)
    ours = apply_colours(images.to(CUDA), colour, 0.8, MEAN.to(CUDA), STD.to(CUDA)).cpu()
    error = (ours - exact).abs() * STD.view(3, 1, 1) * 255
    assert error.mean() < 0.1
    assert (error > 0.5).float().mean() < 2e-3


def test_the_loader_gives_the_same_views_every_time(small_beton):
    """Bit for bit, and near to those of the CPU path."""
    sets = (ViewSet((0, 1), 32), ViewSet((LOCAL, LOCAL + 1), 16))
    epochs = []
    for device in ("cuda", "cuda", "cpu"):
        mean, std, seen = MEAN.to(device), STD.to(device), []
        loader = ViewLoader(
            small_beton, get_recipe("dino"), 3, LoaderConfig("gpu" if device == "cuda" else "ffcv", 7, 2)
        )
        for batch in loader.epoch(np.arange(24), sets):
            seen += [
                batch.to(CUDA if device == "cuda" else mean.device).augment(n, 0.2, mean, std).cpu() for n in (0, 1)
            ]
        epochs.append(seen)
    for a, b, cpu in zip(*epochs, strict=True):
        assert torch.equal(a, b)
        assert ((a - cpu).abs() * STD.view(3, 1, 1)).mean() < 2 / 255
