"""The scale ratios of paired views."""

import numpy as np
import pytest

from rob.common.pair_ratios import pair_ratios
from rob.common.views import Crop, Recipe, RecipeOverrides, get_recipe

SIDES = np.full(500, 400)


def test_ratios_of_crops_of_known_area():
    """Squares of 1 and of 1/16 of the image, at 224 and 96 px."""
    square = (1.0, 1.0)
    recipe = Recipe("r", (Crop(224, (1.0, 1.0), square),), Crop(96, (1 / 16, 1 / 16), square), 2, 1)
    area, magnification = pair_ratios(recipe, 0, SIDES[:1], SIDES[:1])
    assert area == pytest.approx([1, 16, 16])
    assert magnification == pytest.approx([1, (96 / 100) / (224 / 400), (96 / 100) / (224 / 400)])


def test_every_pair_counts_once_and_is_at_least_one():
    ratios = pair_ratios(get_recipe("dino", RecipeOverrides(num_local=3)), 0, SIDES, SIDES)
    assert len(ratios.area) == len(ratios.magnification) == 500 * (1 + 2 * 3)
    assert ratios.area.min() >= 1
    assert ratios.magnification.min() >= 1


def test_sslights_pairs_are_closer_in_scale_than_the_cnn_baselines():
    """The paper's point, against the baseline that its CNNs use."""
    baseline = RecipeOverrides(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), num_local=6)
    before = pair_ratios(get_recipe("dino", baseline), 0, SIDES, SIDES)
    after = pair_ratios(get_recipe("sslight"), 0, SIDES, SIDES)
    assert np.median(after.area) < np.median(before.area)


def test_one_crop_makes_no_pair():
    assert pair_ratios(get_recipe("weak"), 0, SIDES, SIDES).area.size == 0
