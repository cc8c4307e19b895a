"""The prototype cross-entropy of top-k targets, and of numbers at the edge of what a dtype holds."""

from dataclasses import replace

import pytest
import torch

from rob.student_train.kernels import (
    DenseTarget,
    reference,
    topk,
)
from support.prototype_ce_cases import KINDS, call, make_case, topk_target, wide


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ==== top-k targets ====


def test_topk_of_all_prototypes_is_dense():
    logits = torch.randn(4, 2, 30, dtype=torch.float64)
    case = wide(make_case("dense", images=4, num_prototypes=30))
    everything = topk_target(logits, 30, [0.04, 1.0], torch.float64)
    torch.testing.assert_close(call(case, target=everything), call(case, target=DenseTarget(logits)))


def test_topk_mass_is_exact_at_a_ladder_temperature():
    logits = torch.randn(4, 2, 30, dtype=torch.float64)
    target = topk_target(logits, 5, [0.5, 1.0], torch.float64)
    for temp in (0.5, 1.0):
        at_ids, elsewhere = topk.topk_probabilities(target, temp, None)
        exact = torch.softmax(logits / temp, dim=2)
        torch.testing.assert_close(at_ids, exact.gather(2, target.ids))
        torch.testing.assert_close(25 * elsewhere, 1 - exact.gather(2, target.ids).sum(2))


@pytest.mark.parametrize("temp", [0.5, 0.6, 0.8, 1.0])
def test_topk_mass_between_two_temperatures(temp):
    logits = torch.randn(4, 2, 300, dtype=torch.float64)
    target = topk_target(logits, 5, [0.5, 0.7, 1.0], torch.float64)
    exact = torch.logsumexp(logits.scatter(2, target.ids, -torch.inf) / temp, dim=2)
    torch.testing.assert_close(topk.log_tail(target, temp), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("temp", [0.4, 1.1])
def test_a_temperature_outside_of_the_ladder_is_refused(temp):
    target = topk_target(torch.randn(4, 2, 30), 5, [0.5, 1.0])
    with pytest.raises(ValueError, match=r"outside of the target's 0\.5 to 1"):
        topk.log_tail(target, temp)


def test_a_ladder_may_come_in_any_order_and_hold_one_temperature():
    logits = torch.randn(4, 2, 30, dtype=torch.float64)
    up, down = (topk_target(logits, 5, ladder, torch.float64) for ladder in ([0.5, 1.0, 2.0], [1.0, 2.0, 0.5]))
    torch.testing.assert_close(topk.log_tail(up, 0.8), topk.log_tail(down, 0.8))
    one = topk_target(logits, 5, [0.5], torch.float64)
    torch.testing.assert_close(topk.log_tail(one, 0.5), one.tail[..., 0])


def test_topk_centre_is_exact_when_it_is_constant_over_the_tail():
    logits = torch.randn(4, 2, 30, dtype=torch.float64)
    target = topk_target(logits, 5, [0.5], torch.float64)
    centre = torch.full((30,), 0.7, dtype=torch.float64)
    centre[target.ids[0, 0]] = torch.randn(5, dtype=torch.float64)
    found = reference.target_probabilities(target.images(0, 1), 0.5, centre)[0, 0]
    exact = torch.softmax((logits[0, 0] - centre) / 0.5, dim=0)
    torch.testing.assert_close(found[target.ids[0, 0]], exact[target.ids[0, 0]])


def test_uint16_ids():
    case = make_case("topk")
    torch.testing.assert_close(
        call(case, target=replace(case.target, ids=case.target.ids.to(torch.uint16))), call(case)
    )


# ==== numbers at the edge ====


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_large_logits_do_not_overflow(kind, impl):
    """+-25 / 0.04, and far beyond: the largest float16 values on both sides."""
    case = make_case(kind, dtype=torch.float16, teacher_temp=0.04)
    for scale in (25.0, 6e4):
        embedding = (case.embedding.float() * scale).half().requires_grad_()
        loss = call(case._replace(embedding=embedding, prototypes=(case.prototypes.float() * scale).half()), impl)
        loss.backward()
        assert torch.isfinite(loss) and (scale > 25 or torch.isfinite(embedding.grad).all())


def test_shift_of_all_logits_changes_nothing():
    case = wide(make_case("dense"))
    shifted = DenseTarget(case.target.logits + 1000)
    torch.testing.assert_close(call(case, target=shifted), call(case))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_excluded_prototypes_are_no_error(impl):
    case = make_case("dense")
    logits = case.target.logits.clone()
    logits[..., 7:] = -torch.inf
    assert torch.isfinite(call(case, impl, target=DenseTarget(logits)))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_are_named(value, impl):
    case = make_case("embedding")
    embedding = case.embedding.clone()
    embedding[3, 1, 0] = value
    with pytest.raises(FloatingPointError, match=r"student_embedding\[\[3, 1\]\]"):
        call(case._replace(embedding=embedding), impl)
    assert not torch.isfinite(call(case._replace(embedding=embedding), impl, check_finite=False))

    logits = torch.randn(5, 2, 50)
    logits[2, 1] = value
    with pytest.raises(FloatingPointError, match=r"target.logits\[\[2, 1\]\]"):
        call(case, impl, target=DenseTarget(logits))
