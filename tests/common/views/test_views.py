import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.recfunctions import repack_fields
from torchvision.transforms import RandomResizedCrop

from rob.common.errors import MisuseError
from rob.common.views import drawing
from rob.common.views.drawing import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GREY,
    HUE,
    LOCAL,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARISE,
    ViewParameters,
    crop_table,
    view_parameters,
)
from rob.common.views.recipes import RECIPES, Crop, Recipe, RecipeOverrides, evaluation_recipe, get_recipe

DINO = get_recipe("dino")


def draw(
    recipe: Recipe, views, images: int = 1000, seed: int = 0, height: int = 375, width: int = 500
) -> ViewParameters:
    """(images, views) parameters."""
    ids = np.arange(images)[:, None]
    return view_parameters(recipe, seed, ids, np.asarray(views), np.full_like(ids, height), np.full_like(ids, width))


# --- the draw ---


def test_the_draw_is_what_it_always_was():
    """Golden: a store keeps no view, only recipe and seed. If this fails, every store that exists belongs to other pixels."""
    drawn = view_parameters(
        DINO, 7, np.array([0, 1, 2, 10**6]), np.array([0, 1, LOCAL, LOCAL + 5]), *np.full((2, 4), 300)
    )
    np.testing.assert_array_equal(drawn.geometry, GOLDEN_GEOMETRY)
    np.testing.assert_allclose(drawn.colour, GOLDEN_COLOUR, rtol=1e-6)


GOLDEN_GEOMETRY = [[7, 11, 293, 272, 1], [48, 47, 236, 228, 1], [58, 6, 120, 107, 1], [129, 0, 167, 129, 0]]
GOLDEN_COLOUR = [
    [0.89198643, 1.16570592, 1.11413753, -0.0632916465, 3, 0, 1.71572006, 0],
    [1, 1, 1, 0, 14, 0, 0, 0],
    [0.666184783, 1.19574487, 0.994598567, 0.0935650691, 1, 1, 0, 0],
    [0.896944344, 0.717132807, 1.116032, -0.0932996869, 15, 0, 0, 0],
]


@given(
    name=st.sampled_from(sorted(RECIPES)),
    seed=st.integers(-(2**63), 2**64),
    view=st.one_of(st.integers(0, 100), st.integers(LOCAL, LOCAL + 100)),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
)
def test_every_crop_lies_in_its_image(name, seed, view, height, width):
    top, left, h, w, flip = draw(get_recipe(name), [view], 1, seed, height, width).geometry[0, 0].tolist()
    assert 0 <= top < top + h <= height
    assert 0 <= left < left + w <= width
    assert flip in (0, 1)


@pytest.mark.parametrize("view", [0, 1, LOCAL])
def test_crops_are_distributed_as_torchvisions(view):
    crop = DINO.local_crop if view == LOCAL else DINO.global_crops[view]
    assert crop is not None
    ours = draw(DINO, [view], 4000).geometry[:, 0, :4].astype(float)
    image = torch.empty(3, 375, 500)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(4000)]
    theirs = np.array(params, float)
    for quantity in (
        lambda top, left, h, w: h * w / (375 * 500),
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: top / (376 - h),
        lambda top, left, h, w: left / (501 - w),
    ):
        a, b = np.sort(quantity(*ours.T)), np.sort(quantity(*theirs.T))
        assert (
            np.abs(np.searchsorted(b, a) / 4000 - np.arange(4000) / 4000).max() < 0.05
        )  # Kolmogorov and Smirnov's distance
    assert crop.scale[0] - 0.002 <= (ours[:, 2] * ours[:, 3] / (375 * 500)).min()


def test_crops_are_anywhere_in_the_image():
    top, left, h, w, _ = np.moveaxis(draw(DINO, [LOCAL], 4000).geometry[:, 0].astype(float), 1, 0)
    for place in (top / (375 - h), left / (500 - w)):
        assert np.histogram(place, 4, (0, 1))[0] == pytest.approx(1000, rel=0.15)


def test_an_image_too_long_for_any_crop_gives_its_middle():
    assert draw(DINO, [0], 1, height=10, width=1000).geometry[0, 0, :4].tolist() == [0, 493, 10, 13]
    assert draw(DINO, [0], 1, height=1000, width=10).geometry[0, 0, :4].tolist() == [493, 0, 13, 10]


def test_centre_crops_are_centred_squares():
    assert draw(get_recipe("weak"), [3], 1, height=400, width=600).geometry[0, 0, :4].tolist() == [25, 125, 350, 350]
    whole = draw(evaluation_recipe(1.0), [0], 50, height=32, width=32)
    assert (whole.geometry == [0, 0, 32, 32, 0]).all()
    assert (whole.colour[..., [BRIGHTNESS, CONTRAST, SATURATION]] == 1).all()
    assert (whole.colour[..., [HUE, GREY, SIGMA, SOLARISE]] == 0).all()


@pytest.mark.parametrize("view", [0, 1, LOCAL])
def test_colour_is_drawn_with_the_probabilities_and_ranges_of_the_recipe(view):
    crop = DINO.local_crop if view == LOCAL else DINO.global_crops[view]
    assert crop is not None
    drawn = draw(DINO, [view], 4000)
    colour = drawn.colour[:, 0]
    jittered = colour[colour[:, BRIGHTNESS] != 1]
    for share, expected in (
        (np.mean(drawn.geometry[:, 0, FLIP]), crop.flip),
        (len(jittered) / len(colour), crop.jitter),
        (np.mean(colour[:, GREY]), crop.grey),
        (np.mean(colour[:, SIGMA] > 0), crop.blur),
        (np.mean(colour[:, SOLARISE]), crop.solarise),
    ):
        assert share == pytest.approx(expected, abs=0.03)
    for column, middle, spread in (
        (BRIGHTNESS, 1, crop.brightness),
        (CONTRAST, 1, crop.contrast),
        (SATURATION, 1, crop.saturation),
        (HUE, 0, crop.hue),
    ):
        low, high = middle - spread, middle + spread
        assert low - 1e-6 <= jittered[:, column].min() < low + 0.05 * spread
        assert high + 1e-6 >= jittered[:, column].max() > high - 0.05 * spread
    assert np.histogram(colour[:, ORDER], np.arange(25))[0] == pytest.approx(4000 / 24, rel=0.35)
    sigma = colour[colour[:, SIGMA] > 0, SIGMA]
    assert 0.1 <= sigma.min() <= sigma.max() <= 2


def test_global_crops_take_turns_and_local_ones_are_apart():
    colour = draw(DINO, [0, 1, 2, 3, LOCAL]).colour
    assert (colour[:, [0, 2], SIGMA] > 0).all()  # DINO always blurs its first crop
    assert np.mean(colour[:, [1, 3], SIGMA] > 0) < 0.15
    assert (colour[:, [0, 2, 4], SOLARISE] == 0).all()


@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.sampled_from([0, 1, 5, LOCAL, LOCAL + 9])), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_a_view_depends_on_nothing_but_its_ids(pairs, random):
    alone = {pair: view_parameters(DINO, 3, *map(np.array, pair), *map(np.array, (300, 400))) for pair in pairs}
    random.shuffle(pairs)
    images, views = np.array(pairs).T
    together = view_parameters(DINO, 3, images, views, np.full(len(pairs), 300), np.full(len(pairs), 400))
    for row, pair in enumerate(pairs):
        np.testing.assert_array_equal(together.geometry[row], alone[pair].geometry)
        np.testing.assert_array_equal(together.colour[row], alone[pair].colour)


def test_neighbouring_seeds_images_and_views_are_unrelated():
    recipe = get_recipe("moco-v2")
    base = draw(recipe, [0, 1], 2000)
    columns = np.concatenate([base.geometry[:, :, :4], base.colour[:, :, :5]], -1).astype(float)
    other = draw(recipe, [0, 1], 2000, seed=1)
    reseeded = np.concatenate([other.geometry[:, :, :4], other.colour[:, :, :5]], -1).astype(float)
    for column in range(columns.shape[-1]):
        a = columns[..., column]
        for left, right in ((a[:, 0], a[:, 1]), (a[:-1, 0], a[1:, 0]), (a[:, 0], reseeded[:, 0, column])):
            assert abs(np.corrcoef(left, right)[0, 1]) < 0.1


def test_arrays_broadcast():
    drawn = view_parameters(DINO, 0, np.arange(3)[:, None], np.array([0, 1]), np.full((3, 1), 40), np.full((3, 1), 50))
    assert drawn.geometry.shape == (3, 2, 5)
    assert drawn.colour.shape == (3, 2, 8)
    np.testing.assert_array_equal(drawn.colour[2, 1], view_parameters(DINO, 0, *map(np.array, (2, 1, 40, 50))).colour)


def test_the_order_of_a_crops_fields_does_not_matter(monkeypatch):
    """A draw finds them by name: a field that is added or moved must not change what existing stores belong to."""
    expected = draw(DINO, [0, 1, LOCAL], 100)
    table, names = crop_table(DINO), [field.name for field in fields(Crop)]
    assert list(table.dtype.names) == names
    monkeypatch.setattr(drawing, "crop_table", lambda recipe: repack_fields(table[names[::-1]]))
    for reordered, original in zip(draw(DINO, [0, 1, LOCAL], 100), expected, strict=True):
        np.testing.assert_array_equal(reordered, original)


# --- recipes ---


@pytest.mark.parametrize(
    ("name", "globals_", "local", "crops", "sizes"),
    [
        ("dino", (0.25, 1), (0.05, 0.25), (2, 10), (224, 96)),
        ("sslight", (0.3, 1), (0.05, 0.3), (2, 10), (224, 128)),
        ("swav", (0.14, 1), (0.05, 0.14), (2, 6), (224, 96)),
        ("sslight-swav", (0.3, 1), (0.05, 0.3), (2, 6), (224, 128)),
        ("msn", (0.3, 1), (0.05, 0.3), (2, 10), (224, 96)),
        ("moco-v2", (0.2, 1), None, (2, 0), (224, None)),
    ],
)
def test_recipes_have_the_papers_crops(name, globals_, local, crops, sizes):
    recipe = get_recipe(name)
    assert {crop.scale for crop in recipe.global_crops} == {globals_}
    assert (recipe.local_crop and recipe.local_crop.scale) == local
    assert (recipe.num_global, recipe.num_local) == crops
    assert (recipe.global_crops[0].size, recipe.local_crop and recipe.local_crop.size) == sizes


@pytest.mark.parametrize(
    ("name", "jitter", "blur", "solarise"),
    [
        ("dino", (0.4, 0.4, 0.2, 0.1), [1, 0.1, 0.5], [0, 0.2, 0]),
        ("sslight", (0.4, 0.4, 0.2, 0.1), [1, 0.1, 0.5], [0, 0.2, 0]),
        ("swav", (0.8, 0.8, 0.8, 0.2), [0.5, 0.5], [0, 0]),
        ("sslight-swav", (0.8, 0.8, 0.8, 0.2), [0.5, 0.5], [0, 0]),
        ("msn", (0.4, 0.4, 0.4, 0.1), [0.5, 0.5], [0, 0]),
        ("moco-v2", (0.4, 0.4, 0.4, 0.1), [0.5], [0]),
    ],
)
def test_recipes_have_the_papers_colours(name, jitter, blur, solarise):
    recipe = get_recipe(name)
    crops = [*recipe.global_crops, *([recipe.local_crop] if recipe.local_crop else [])]
    for crop in crops:
        assert (crop.brightness, crop.contrast, crop.saturation, crop.hue) == jitter
        assert (crop.jitter, crop.grey, crop.flip, crop.sigma) == (0.8, 0.2, 0.5, (0.1, 2))
    assert [crop.blur for crop in crops] == blur
    assert [crop.solarise for crop in crops] == solarise


def test_recipes_survive_json():
    for recipe in RECIPES.values():
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_overrides_change_what_they_name():
    recipe = get_recipe(
        "dino",
        RecipeOverrides(num_local=4, global_scale=(0.5, 0.6), colour=0.5, flip=0.0, grey=0.1, blur=0.0, solarise=0.3),
    )
    assert (recipe.num_global, recipe.num_local) == (2, 4)
    assert recipe.local_crop is not None
    assert recipe.local_crop.scale == (0.05, 0.25)
    for crop in recipe.global_crops:
        assert (crop.scale, crop.hue, crop.flip, crop.grey, crop.blur, crop.solarise) == (
            (0.5, 0.6),
            0.05,
            0,
            0.1,
            0,
            0.3,
        )
        assert (crop.brightness, crop.contrast, crop.saturation) == (0.2, 0.2, 0.1)
    assert get_recipe("weak", RecipeOverrides(global_scale=(0.2, 1.0))).global_crops[0].centre == 0
    centred = get_recipe("dino", RecipeOverrides(centre=0.9))
    assert [crop.centre for crop in centred.global_crops] == [0.9, 0.9] and centred.local_crop == RECIPES[
        "dino"
    ].local_crop
    assert RecipeOverrides(centre=0.9).over(RecipeOverrides(global_scale=(0.5, 1.0))) == RecipeOverrides(centre=0.9)
    assert get_recipe("dino", RecipeOverrides()) == get_recipe("dino") == RECIPES["dino"]
    for filter_ in ("bilinear", "bicubic"):
        assert get_recipe("swav", RecipeOverrides(interpolation=filter_)).interpolation == filter_
        assert evaluation_recipe(0.5, filter_).cubic == (filter_ == "bicubic")
    assert evaluation_recipe(0.5).interpolation == "bilinear"


def test_colour_zero_turns_the_jitter_off():
    colour = draw(get_recipe("swav", RecipeOverrides(colour=0.0)), [0, LOCAL]).colour
    assert (colour[..., [BRIGHTNESS, CONTRAST, SATURATION, HUE]] == [1, 1, 1, 0]).all()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"global_scale": (0.0, 1.0)}, "scale"),
        ({"global_scale": (0.9, 0.5)}, "scale"),
        ({"local_scale": (0.1, 1.5)}, "scale"),
        ({"flip": 1.5}, "flip"),
        ({"grey": -0.1}, "grey"),
        ({"colour": -1.0}, "colour"),
        ({"centre": 2.0}, "centre"),
        ({"num_global": 0}, "global"),
        ({"num_local": -1}, "local"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': did you mean bicubic"),
    ],
)
def test_overrides_out_of_range_are_refused(overrides, says):
    with pytest.raises(MisuseError, match=says):
        get_recipe("dino", RecipeOverrides(**overrides))


def test_local_crops_need_a_recipe_that_has_them():
    with pytest.raises(MisuseError, match="moco-v2 has no local crop"):
        get_recipe("moco-v2", RecipeOverrides(num_local=6))


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(MisuseError, match="did you mean dino"):
        get_recipe("dinno")


def test_a_crop_refuses_an_impossible_ratio_and_size():
    with pytest.raises(MisuseError, match="ratio"):
        Crop(224, ratio=(2.0, 1.0))
    with pytest.raises(MisuseError, match="sizes"):
        Crop(0)
