"""Colours of patches say what is alike, in pictures drawn together."""

import numpy as np
import torch

from rob.common.look.patch_colours import laid_over, patch_colours


def test_places_that_are_alike_have_one_colour_in_all_pictures():
    torch.manual_seed(0)
    kinds = torch.randn(3, 32)
    which = torch.randint(0, 3, (4, 6, 6))
    colours = patch_colours((kinds[which] + 0.01 * torch.randn(4, 6, 6, 32)).movedim(-1, 1)).astype(int)
    means = np.stack([colours[which.numpy() == kind].mean(0) for kind in range(3)])
    for kind in range(3):
        assert np.abs(colours[which.numpy() == kind] - means[kind]).max() < 25
        assert np.abs(means - means[kind]).max(1)[np.arange(3) != kind].min() > 100


def test_one_component_and_one_position_are_no_accident():
    assert patch_colours(torch.ones(2, 5, 1, 1)).shape == (2, 1, 1, 3)
    one = patch_colours(torch.arange(8.0).view(2, 1, 2, 2))
    assert one[..., 0].ravel().tolist() == sorted(one[..., 0].ravel().tolist())


def test_a_colour_lies_where_its_patch_is():
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[0, 1, 0] = 255
    shown = laid_over(np.full((64, 64, 3), 100, np.uint8), colours)
    redness = shown[..., 0].astype(int) - shown[..., 1]
    assert redness[:16, 48:].min() > 150
    assert redness[48:, :16].max() == 0
