"""Where patches are: with a teacher whose tokens are the places on the image, every position of the student gets its own."""

import numpy as np
import pytest
import torch

from rob.common.views.drawing import CROP_HEIGHT, CROP_WIDTH, FLIP, LEFT, LOCAL, TOP, view_parameters
from rob.common.views.recipes import get_recipe
from rob.student_train.masks import block_masks
from rob.student_train.targets.dense import Placement, align_regions
from rob.student_train.targets.view_plan import ViewPlan

RECIPE, SEED, GRID = get_recipe("dino"), 5, 7
IDS = np.arange(40)
HEIGHTS, WIDTHS = 90 + IDS % 7 * 20, 120 + IDS % 5 * 30
PLAN = ViewPlan((2, 3), (2, 3, 9), (LOCAL, LOCAL + 1, LOCAL + 4), torch.ones(6, 2) / 12, epoch=1)


def places(views, side: int) -> torch.Tensor:
    """(B, n, 2, side, side) float64: column and row on the image, in pixels, of the middle of each of a view's positions, found
    pixel by pixel from what a view is: a crop, resized, and then flipped.
    """
    found = np.empty((len(IDS), len(views), 2, side, side))
    middle = (np.arange(side) + 0.5) / side
    for b, image in enumerate(IDS):
        for n, view in enumerate(views):
            one = view_parameters(
                RECIPE, SEED, *(np.array([v]) for v in (image, view, HEIGHTS[b], WIDTHS[b]))
            ).geometry[0]
            columns = one[LEFT] + middle * one[CROP_WIDTH]
            columns = columns[::-1] if one[FLIP] else columns
            found[b, n] = np.broadcast_arrays(columns[None, :], (one[TOP] + middle * one[CROP_HEIGHT])[:, None])
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def placement():
    return Placement(IDS, HEIGHTS, WIDTHS, PLAN, RECIPE, SEED)


@pytest.mark.parametrize("side", [3, 6])
def test_a_local_crop_finds_its_places_in_the_targets(placement, side):
    tokens = places(PLAN.targets, GRID)
    found, inside = align_regions(tokens, placement.regions(), side)
    wanted = places(PLAN.locals, side)[:, :, None].expand_as(found)
    # Tokens stand for the middles of cells: within half a cell of a target's border there is none further out to interpolate to.
    regions = placement.regions()
    drawn = view_parameters(
        RECIPE, SEED, IDS[:, None], np.array(PLAN.targets)[None], HEIGHTS[:, None], WIDTHS[:, None]
    ).geometry
    box = torch.from_numpy(drawn).double()[:, None, :, :, None, None]
    within = torch.stack(
        [
            (wanted[:, :, :, 0] - box[:, :, :, LEFT]) / box[:, :, :, CROP_WIDTH],
            (wanted[:, :, :, 1] - box[:, :, :, TOP]) / box[:, :, :, CROP_HEIGHT],
        ],
        3,
    )
    half = 0.5 / GRID
    margin = half + (regions.boxes[..., 2:] - regions.boxes[..., :2])[..., None, None] / side / 2
    clear = ((within > margin) & (within < 1 - margin)).all(3)
    for turned in (regions.mirrored, ~regions.mirrored):
        assert (clear & turned[..., None, None]).sum() > 50
    assert inside[clear].all()
    torch.testing.assert_close(found.movedim(3, -1)[clear], wanted.movedim(3, -1)[clear], rtol=0, atol=1e-9)
    sizes = torch.from_numpy(np.stack([WIDTHS, HEIGHTS], 1)).double()[:, None, None, :, None, None]
    off = ((found - wanted) / sizes).abs().amax(3)
    assert off[inside].max() < half  # at the border: by less than half a cell
    assert 0.2 < inside.double().mean() < 0.95


def test_what_is_outside_of_a_target_is_not_compared(placement):
    """A position counts where all of it is in the target's view, by the pixels of both."""
    side = 4
    _, inside = align_regions(places(PLAN.targets, GRID), placement.regions(), side)
    middles = places(PLAN.locals, side)
    for b in range(len(IDS)):
        for g, view in enumerate(PLAN.targets):
            box = view_parameters(
                RECIPE, SEED, *(np.array([v]) for v in (IDS[b], view, HEIGHTS[b], WIDTHS[b]))
            ).geometry[0]
            for n in range(3):
                column, row = middles[b, n]
                within = (column > box[LEFT]) & (column < box[LEFT] + box[CROP_WIDTH])
                within &= (row > box[TOP]) & (row < box[TOP] + box[CROP_HEIGHT])
                assert not (inside[b, n, g] & ~within).any()


# ==== what iBOT hides ====


def test_masks_are_blocks_of_the_shares_that_were_published_and_replay():
    masks = block_masks(3, np.arange(3000), np.array([0, 7]), 2, 14)
    share = masks.double().mean((2, 3))
    assert 0.47 < (share == 0).double().mean() < 0.55
    assert share.max() <= 0.5
    assert 0.26 < share[share > 0].mean() < 0.31  # of .1 to .5, less what does not fit any more
    again = block_masks(3, np.array([17, 4]), np.array([7]), 2, 14)
    assert torch.equal(again[:, 0], masks[[17, 4], 1])
    assert not torch.equal(block_masks(3, np.arange(50), np.array([0]), 3, 14), masks[:50, :1])
    alone = masks.double()
    around = torch.nn.functional.avg_pool2d(alone, 3, 1, 1)[masks].mean()
    assert around > 0.7  # of the nine patches around a hidden one, most are hidden, too
