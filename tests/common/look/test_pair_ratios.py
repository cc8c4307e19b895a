"""The scale ratios of paired views."""

import numpy as np
import pytest

from rob.common.look.pair_ratios import pair_ratios, weighted_median
from rob.common.views.recipes import Crop, Recipe, RecipeOverrides, get_recipe
from rob.student_train.targets.pairing import choose_pairing, plan_views

SIDES = np.full(500, 400)


def test_ratios_of_crops_of_known_area():
    """Squares of 1 and of 1/16 of the image, at 224 and 96 px."""
    square = (1.0, 1.0)
    recipe = Recipe("r", (Crop(224, (1.0, 1.0), square),), Crop(96, (1 / 16, 1 / 16), square), 2, 1)
    area, magnification, _ = pair_ratios(recipe, 0, SIDES[:1], SIDES[:1])
    assert area == pytest.approx([1, 16, 16])
    assert magnification == pytest.approx([1, (96 / 100) / (224 / 400), (96 / 100) / (224 / 400)])


def test_every_pair_counts_once_and_is_at_least_one():
    ratios = pair_ratios(get_recipe("dino", RecipeOverrides(num_local=3)), 0, SIDES, SIDES)
    assert len(ratios.area) == len(ratios.magnification) == 500 * (1 + 2 * 3)
    assert ratios.area.min() >= 1
    assert ratios.magnification.min() >= 1


@pytest.mark.parametrize("name", ["dino", "sslight", "swav", "moco-v2"])
def test_pairs_weigh_what_they_do_in_the_loss(name):
    recipe = get_recipe(name)
    ratios = pair_ratios(recipe, 0, SIDES[:3], SIDES[:3])
    plan = plan_views(choose_pairing("dino", recipe, 1 << 20, from_student=True), 1 << 20, 0)
    expected = plan.pair_weights[:2].sum().item()
    of_an_image = ratios.weight.reshape(3, -1)
    assert of_an_image[:, 0] == pytest.approx(expected / 3)
    assert ratios.weight.sum() == pytest.approx(1)
    assert of_an_image[0, 1:] == pytest.approx((1 - expected) / 3 / max(1, len(of_an_image[0, 1:])))


def test_a_weighted_median_has_half_the_weight_below_it():
    values = np.array([3.0, 1.0, 2.0])
    assert weighted_median(values, np.array([1.0, 1.0, 1.0])) == 2
    assert weighted_median(values, np.array([5.0, 1.0, 1.0])) == 3


def test_sslights_pairs_are_closer_in_scale_than_the_cnn_baselines():
    """The paper's point, against the baseline that its CNNs use."""
    baseline = RecipeOverrides(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), num_local=6)
    before = pair_ratios(get_recipe("dino", baseline), 0, SIDES, SIDES)
    after = pair_ratios(get_recipe("sslight"), 0, SIDES, SIDES)
    assert np.median(after.area) < np.median(before.area)


def test_one_crop_makes_no_pair():
    assert pair_ratios(get_recipe("weak"), 0, SIDES, SIDES).area.size == 0
