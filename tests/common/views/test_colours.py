import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as tv

from rob.common.views import drawing
from rob.common.views.colours import apply_colours, apply_colours_torch
from rob.common.views.colours_compiled import ORDERS
from rob.common.views.drawing import LOCAL, UNCHANGED, view_parameters
from rob.common.views.recipes import get_recipe
from support.photographs import photograph

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
RAW = torch.zeros(3), torch.ones(3)
"""Mean and deviation that leave values in [0, 1]."""
IMPLEMENTATIONS = [apply_colours, apply_colours_torch]


def photographs(count: int, size: int = 40) -> Tensor:
    """(count, 3, size, size) uint8, one of them noise, one black and one white."""
    images = torch.stack([torch.from_numpy(photograph(i, size, size).copy()).permute(2, 0, 1) for i in range(count)])
    if count > 3:
        images[0] = torch.randint(0, 256, images[0].shape, generator=torch.Generator().manual_seed(0))
        images[1], images[2] = 0, 255
    return images


def neutral(count: int, **columns: float) -> Tensor:
    """Parameters that change nothing but the named columns."""
    colour = torch.tensor(UNCHANGED).repeat(count, 1)
    for name, value in columns.items():
        colour[:, getattr(drawing, name)] = value
    return colour


def drawn(recipe: str, count: int) -> Tensor:
    views = np.arange(count) + np.where(np.arange(count) % 3, 0, LOCAL)
    return torch.from_numpy(
        view_parameters(get_recipe(recipe), 0, np.arange(count), views, *np.full((2, count), 99)).colour
    )


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda f: f.__name__)
def implementation(request):
    return request.param


# --- every operation against torchvision ---


@pytest.mark.parametrize("factor", [0.0, 0.7, 1.8])
@pytest.mark.parametrize(
    ("column", "operation"),
    [("BRIGHTNESS", tv.adjust_brightness), ("CONTRAST", tv.adjust_contrast), ("SATURATION", tv.adjust_saturation)],
)
def test_jitter_is_torchvisions(implementation, column, operation, factor):
    images = photographs(6)
    expected = torch.stack([operation(image / 255, factor) for image in images])
    torch.testing.assert_close(
        implementation(images, neutral(6, **{column: factor}), 1.0, *RAW), expected, atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("shift", [-0.5, -0.01, 0.1, 0.5])
def test_hue_is_torchvisions(implementation, shift):
    images = photographs(6)
    expected = torch.stack([tv.adjust_hue(image / 255, shift) for image in images])
    torch.testing.assert_close(implementation(images, neutral(6, HUE=shift), 1.0, *RAW), expected, atol=2e-6, rtol=0)


def test_grey_and_solarise_are_torchvisions(implementation):
    images = photographs(6)
    expected = torch.stack([tv.rgb_to_grayscale(image / 255, 3) for image in images])
    torch.testing.assert_close(implementation(images, neutral(6, GREY=1), 1.0, *RAW), expected, atol=1e-6, rtol=0)
    expected = torch.stack([tv.solarize(image, 128) / 255 for image in images])
    torch.testing.assert_close(implementation(images, neutral(6, SOLARISE=1), 1.0, *RAW), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [40, 33])
@pytest.mark.parametrize("sigma", [0.1, 0.9, 2.0])
def test_blur_is_torchvisions_with_a_kernel_of_three_sigma(implementation, sigma, size):
    images = photographs(6, size)
    side = 2 * int(np.ceil(3 * np.float32(sigma))) + 1
    expected = torch.stack([tv.gaussian_blur(image / 255, [side, side], [sigma, sigma]) for image in images])
    torch.testing.assert_close(implementation(images, neutral(6, SIGMA=sigma), 1.0, *RAW), expected, atol=2e-6, rtol=0)


def test_blur_radii_scale_with_the_size_of_the_view(implementation):
    images = photographs(4)
    torch.testing.assert_close(
        implementation(images, neutral(4, SIGMA=1.6), 0.5, *RAW),
        implementation(images, neutral(4, SIGMA=0.8), 1.0, *RAW),
    )


def test_the_parts_of_the_jitter_come_in_the_drawn_order(implementation):
    image = photographs(5)[4:]
    operations = (
        lambda x: tv.adjust_brightness(x, 1.4),
        lambda x: tv.adjust_contrast(x, 1.5),
        lambda x: tv.adjust_saturation(x, 0.3),
        lambda x: tv.adjust_hue(x, 0.2),
    )
    for order in range(24):
        expected = image / 255
        for part in ORDERS[order]:
            expected = operations[part](expected)
        colour = neutral(1, BRIGHTNESS=1.4, CONTRAST=1.5, SATURATION=0.3, HUE=0.2, ORDER=order)
        torch.testing.assert_close(implementation(image, colour, 1.0, *RAW), expected, atol=5e-6, rtol=0)


def test_what_follows_the_jitter_comes_in_the_papers_order(implementation):
    image = photographs(5)[4:]
    colour = neutral(1, BRIGHTNESS=1.3, GREY=1, SIGMA=1.0, SOLARISE=1)
    x = tv.rgb_to_grayscale(tv.adjust_brightness(image / 255, 1.3), 3)
    x = tv.gaussian_blur(x, [7, 7], [1.0, 1.0])
    expected = tv.normalize(torch.where(x < 128 / 255, x, 1 - x), MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(implementation(image, colour, 1.0, MEAN, STD), expected, atol=2e-5, rtol=0)


def test_nothing_drawn_means_normalised_only(implementation):
    images = photographs(5)
    expected = tv.normalize(images / 255, MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(implementation(images, neutral(5), 1.0, MEAN, STD), expected, atol=2e-6, rtol=0)


# --- all together ---


@pytest.mark.parametrize("recipe", ["dino", "swav", "moco-v2"])
def test_the_compiled_code_equals_the_torch_formulas(recipe):
    """But for a value that falls to either side of the solarise threshold: 2 x - 1 is what that changes."""
    images, colour = photographs(60), drawn(recipe, 60)
    a, b = (f(images, colour, 0.7, MEAN, STD) for f in IMPLEMENTATIONS)
    assert (a - b).abs().max() < 0.04
    assert ((a - b).abs() > 2e-5).float().mean() < 1e-4


@settings(max_examples=20)
@given(st.permutations(range(12)), st.integers(1, 12), st.sampled_from([1, 2]))
def test_a_view_looks_the_same_whatever_the_batch(order, count, threads):
    images, colour = photographs(12, 17), drawn("dino", 12)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for f in IMPLEMENTATIONS:
            whole = f(images, colour, 0.4, MEAN, STD)
            some = order[:count]
            assert torch.equal(f(images[some], colour[some], 0.4, MEAN, STD), whole[some])
    finally:
        torch.set_num_threads(before)


def test_inputs_are_left_alone_and_may_have_any_strides(implementation):
    images, colour = photographs(8), drawn("dino", 8)
    kept = images.clone(), colour.clone()
    expected = implementation(images, colour, 1.0, MEAN, STD)
    assert torch.equal(images, kept[0])
    assert torch.equal(colour, kept[1])
    turned = images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    wide = torch.zeros(8, 9)
    wide[:, :8] = colour
    assert torch.equal(implementation(turned, wide[:, :8], 1.0, MEAN, STD), expected)
    assert expected.is_contiguous()
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_views(implementation, size):
    images = photographs(3, size)
    out = implementation(images, neutral(3, SIGMA=2.0, CONTRAST=1.4, HUE=0.1), 1.0, MEAN, STD)
    assert out.shape == images.shape
    assert out.isfinite().all()


def test_an_empty_batch(implementation):
    assert implementation(photographs(1)[:0], neutral(0), 1.0, MEAN, STD).shape == (0, 3, 40, 40)
