"""Which views meet: the plan of every epoch, its weights, and the combinations that leave nothing to learn from."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rob.common.errors import MisuseError
from rob.common.views.drawing import LOCAL
from rob.common.views.recipes import get_recipe
from rob.student_train.config import PAIRINGS, PairingChoice, PairingConfig
from rob.student_train.targets.pairing import ViewPlan, choose_pairing, plan_views


@st.composite
def pairings(draw: st.DrawFn) -> PairingConfig:
    """Any pairing that is allowed."""
    settings = {
        "pairing": draw(st.sampled_from(PAIRINGS)),
        "step_targets": draw(st.integers(1, 5)),
        "num_local": draw(st.integers(0, 4)),
        "fresh": draw(st.booleans()),
        "global_weight": draw(st.none() | st.floats(0, 1)),
        "step_globals": draw(st.none() | st.integers(1, 6)),
    }
    try:
        return PairingConfig(**settings)
    except MisuseError:
        assume(False)
        raise


def epochs_of(config: PairingConfig, cached_views: int, epochs: int) -> list[ViewPlan]:
    return [plan_views(config, cached_views, epoch) for epoch in range(epochs)]


@given(pairings(), st.integers(0, 5), st.integers(1, 12))
def test_targets_rotate_evenly_over_the_cached_views(config, more, epochs):
    views = config.step_targets + more
    plans = epochs_of(config, views, epochs)
    used = [view for plan in plans for view in plan.targets]
    assert used == [n % views for n in range(epochs * config.step_targets)]
    assert all(len(set(plan.targets)) == config.step_targets for plan in plans)


@given(pairings(), st.integers(0, 5))
def test_what_is_fresh_never_repeats_and_is_never_a_cached_view(config, more):
    views = config.step_targets + more
    plans = epochs_of(config, views, 6)
    fresh = [view for plan in plans for view in plan.globals if view not in plan.targets]
    locals_ = [view for plan in plans for view in plan.locals]
    assert len({*fresh}) == len(fresh)
    assert len({*locals_}) == len(locals_) == 6 * config.num_local
    assert all(views <= view < LOCAL for view in fresh)
    assert all(view >= LOCAL for view in locals_)
    replayed = 0 if config.pairing == "cross" and config.fresh else min(config.step_targets, config.num_global)
    assert len(fresh) == 6 * (config.num_global - replayed)
    for plan in plans:
        assert plan.num_replayed == replayed
        assert plan.globals[:replayed] == plan.targets[:replayed]
        assert len(plan.globals) == (config.step_globals or config.step_targets)


@given(pairings(), st.integers(0, 5), st.integers(0, 1000))
def test_weights_sum_to_one_over_the_pairs_that_may_meet(config, more, epoch):
    plan = plan_views(config, config.step_targets + more, epoch)
    student = plan.globals + plan.locals
    assert plan.pair_weights.shape == (len(student), config.step_targets)
    assert plan.pair_weights.dtype == torch.float32
    assert plan.pair_weights.sum().item() == pytest.approx(1)
    assert (plan.pair_weights >= 0).all()
    for row, view in zip(plan.pair_weights.tolist(), student, strict=True):
        for weight, target in zip(row, plan.targets, strict=True):
            another = view in plan.targets and view != target
            if (config.pairing == "same" and another) or (config.pairing == "cross" and view == target):
                assert weight == 0
            elif config.global_weight is None:
                assert weight > 0
    if config.global_weight is None:  # all pairs weigh alike, and no target goes without
        assert plan.pair_weights[plan.pair_weights > 0].unique().numel() == 1
        assert plan.pair_weights.any(0).all()


@pytest.mark.parametrize("epoch", [0, 3])
def test_rob_as_released_pairs_a_global_crop_with_its_own_view_and_a_local_one_with_all(epoch):
    plan = plan_views(PairingConfig("same", step_targets=2, num_local=8), cached_views=4, epoch=epoch)
    assert plan.globals == plan.targets
    torch.testing.assert_close(plan.pair_weights, torch.cat([torch.eye(2), torch.ones(8, 2)]) / 18)
    assert (plan.pair_weights > 0).sum() == 18


@pytest.mark.parametrize(("epoch", "target", "second"), [(0, 0, 5), (1, 1, 7), (4, 0, 13)])
def test_robs_swav_has_one_target_for_all_crops_the_second_global_one_included(epoch, target, second):
    config = PairingConfig("same", step_targets=1, num_local=4, step_globals=2)
    plan = plan_views(config, cached_views=4, epoch=epoch)
    assert (plan.targets, plan.globals) == ((target,), (target, second))  # fresh: of no view that is cached
    torch.testing.assert_close(plan.pair_weights, torch.full((6, 1), 1 / 6))


def test_fewer_global_crops_than_targets():
    """MSN has one; what is left of a target's views meets local crops, or another target's view."""
    weights = plan_views(PairingConfig("cross", 2, 1, fresh=False, step_globals=1), 2, 0).pair_weights
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0], [1.0, 1.0]]) / 3)
    weights = plan_views(PairingConfig("same", 2, 1, step_globals=1), 2, 0).pair_weights
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [1.0, 1.0]]) / 3)


def test_global_weight_divides_robs_pairs_too():
    weights = plan_views(PairingConfig("same", 2, 8, global_weight=0.4), 2, 0).pair_weights
    torch.testing.assert_close(weights[:2], 0.2 * torch.eye(2))
    torch.testing.assert_close(weights[2:], torch.full((8, 2), 0.6 / 16))


def test_same_is_each_view_against_its_own_target():
    plan = plan_views(PairingConfig("same", step_targets=3), cached_views=4, epoch=1)
    assert plan.globals == plan.targets == (3, 0, 1)
    torch.testing.assert_close(plan.pair_weights, torch.eye(3) / 3)


def test_cross_replayed_skips_the_diagonal_as_dino_does():
    plan = plan_views(PairingConfig("cross", step_targets=2, num_local=2, fresh=False), cached_views=2, epoch=0)
    assert plan.globals == plan.targets == (0, 1)
    torch.testing.assert_close(plan.pair_weights, torch.tensor([[0.0, 1], [1, 0], [1, 1], [1, 1]]) / 6)


def test_cross_with_fresh_views_and_all_use_every_pair():
    fresh = plan_views(PairingConfig("cross", step_targets=2), cached_views=3, epoch=2)
    assert (fresh.targets, fresh.globals) == ((1, 2), (7, 8))
    replayed = plan_views(PairingConfig("all", step_targets=2), cached_views=3, epoch=2)
    assert replayed.globals == replayed.targets == (1, 2)
    for plan in (fresh, replayed):
        torch.testing.assert_close(plan.pair_weights, torch.full((2, 2), 0.25))


def test_global_weight_is_sslights_alpha_and_beta():
    """alpha times the mean over global-global pairs plus beta times the mean over global-local ones (2210.02808)."""
    config = PairingConfig("cross", step_targets=2, num_local=6, fresh=False, global_weight=0.4)
    weights = plan_views(config, cached_views=2, epoch=0).pair_weights
    torch.testing.assert_close(weights[:2], torch.tensor([[0.0, 1], [1, 0]]) * 0.4 / 2)
    torch.testing.assert_close(weights[2:], torch.full((6, 2), 0.6 / 12))


def test_uniform_weights_are_sslights_baseline():
    """alpha and beta of 1/7 and 6/7 for six local crops are DINO's mean over all pairs."""
    uniform, weighted = (
        plan_views(PairingConfig("cross", 2, 6, fresh=False, global_weight=alpha), 2, 0).pair_weights
        for alpha in (None, 1 / 7)
    )
    torch.testing.assert_close(uniform, weighted)


def test_too_few_cached_views_are_refused():
    with pytest.raises(MisuseError, match=r"holds 1 views .* uses 2: pass `step_targets` 1, or .* --views 2"):
        plan_views(PairingConfig("cross", step_targets=2), cached_views=1, epoch=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairing": "crosss"}, "unknown pairing 'crosss': did you mean cross"),
        ({"step_targets": 0}, "`step_targets` is 0, expected at least 1"),
        ({"num_local": -1}, "`num_local` is -1, expected at least 0"),
        ({"step_globals": 0}, "`step_globals` is 0, expected at least 1"),
        ({"pairing": "same", "step_globals": 1}, "`step_globals` 1 leaves some of `step_targets` 2 without a crop"),
        ({"step_targets": 1, "fresh": False}, "leaves no pair"),
        ({"num_local": 2, "global_weight": 1.5}, "`global_weight` is 1.5, expected at most 1"),
        ({"global_weight": 0.4}, "there are none"),
        ({"step_targets": 1, "num_local": 2, "fresh": False, "global_weight": 1.0}, "leaves no pair"),
    ],
)
def test_combinations_that_cannot_be(settings, message):
    with pytest.raises(MisuseError, match=message):
        PairingConfig(**settings)


def test_defaults_are_the_objectives_papers():
    dino, moco = get_recipe("dino"), get_recipe("moco-v2")
    assert choose_pairing("embedding", dino, views=4) == PairingConfig("same", 2, 0)
    assert choose_pairing("dino", dino, views=4) == PairingConfig("cross", 2, dino.num_local)
    assert choose_pairing("disco", dino, views=4) == PairingConfig("same", 2, 0)
    assert choose_pairing("msn", dino, views=4) == PairingConfig("cross", 2, dino.num_local)
    assert choose_pairing("seed", dino, views=4) == PairingConfig("same", 1, 0)
    assert (
        choose_pairing("msn", dino, 4, PairingChoice(fresh=False)).step_targets == 2
    )  # else no global crop would meet a target
    assert choose_pairing("dino", moco, views=1) == PairingConfig("cross", 1, 0)
    sslight = get_recipe("sslight")
    assert choose_pairing("dino", sslight, views=4) == PairingConfig("cross", 2, 10, global_weight=0.4)
    assert choose_pairing("dino", sslight, 4, PairingChoice(global_weight=0.7)).global_weight == 0.7
    assert choose_pairing("dino", sslight, 4, PairingChoice(num_local=0)).global_weight is None
    chosen = choose_pairing("dino", dino, 4, PairingChoice("cross", step_targets=3, num_local=0, fresh=False))
    assert chosen == PairingConfig("cross", 3, 0, fresh=False)


def test_swav_has_one_target_of_a_teacher_for_two_global_crops():
    swav = get_recipe("swav")
    assert choose_pairing("swav", swav, 4) == PairingConfig("cross", 1, 6, step_globals=2)
    assert choose_pairing("swav", swav, 4, PairingChoice("same", num_local=4)) == PairingConfig(
        "same", 1, 4, step_globals=2
    )
    assert choose_pairing("swav", swav, 4, PairingChoice(step_globals=1)) == PairingConfig(
        "cross", 1, 6, step_globals=1
    )
    two = PairingConfig("cross", 2, 6)
    assert choose_pairing("swav", swav, 4, PairingChoice(step_targets=2)) == two
    assert choose_pairing("swav", swav, 4, from_student=True) == replace(two, fresh=False)
    assert choose_pairing("msn", get_recipe("msn"), 4) == PairingConfig("cross", 2, 10)


def test_disco_is_of_the_same_views():
    with pytest.raises(MisuseError, match="`objective` disco compares the same views: leave out `pairing`"):
        choose_pairing("disco", get_recipe("dino"), 4, PairingChoice("cross"))
    for choice in (PairingChoice(num_local=2), PairingChoice(step_globals=3)):
        with pytest.raises(MisuseError, match="disco compares the same views alone: leave out `num_local` and `step_g"):
            choose_pairing("disco", get_recipe("dino"), 4, choice)


def test_same_has_the_local_crops_and_global_crops_that_are_asked_for():
    dino = get_recipe("rob-dino")
    assert choose_pairing("dino", dino, 4, PairingChoice("same")) == PairingConfig("same", 2, 0)
    asked = PairingChoice("same", step_targets=1, num_local=8, step_globals=2)
    assert choose_pairing("swav", dino, 4, asked) == PairingConfig("same", 1, 8, step_globals=2)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("pairing", ["same", "all"])
def test_fresh_and_replay_are_for_cross_only(pairing, fresh):
    with pytest.raises(MisuseError, match=r"^`fresh` is for `pairing` cross"):
        choose_pairing("embedding", get_recipe("moco-v2"), 2, PairingChoice(pairing, fresh=fresh))
