"""The prototype cross-entropy on a CPU: against the formula in float64, and what it promises of numbers and arguments."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from rob.student_train.kernels import (
    DenseTarget,
    EmbeddingTarget,
    TopKTarget,
    chunked,
    prototype_ce,
    reference,
)
from support.prototype_ce_cases import KINDS, assert_as_exact_as_torch, call, make_case, outcome, wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two images in small cases, so that there are several and the last is short."""
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(chunked, "FEWEST_ROWS", 12)


# ==== the reference itself ====


def test_reference_with_one_certain_target_is_torch_cross_entropy():
    """A target that is sure of one prototype: H(q, p) is the cross-entropy with an integer label."""
    logits = torch.full((6, 1, 9), -1e4, dtype=torch.float64)
    labels = torch.arange(6) % 9
    logits[torch.arange(6), 0, labels] = 0
    embedding, prototypes = torch.randn(6, 1, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    ours = reference.prototype_cross_entropy(
        embedding, prototypes, DenseTarget(logits), 0.2, 1.0, None, torch.ones(1, 1, dtype=torch.float64)
    )
    torch.testing.assert_close(ours, cross_entropy(embedding[:, 0] @ prototypes.T / 0.2, labels))


def test_reference_is_dinos_double_loop():
    """facebookresearch/dino main_dino.py, DINOLoss.forward: the mean over pairs of different views."""
    case = wide(make_case("embedding", images=6, views=5))
    q = torch.softmax((case.target.embedding @ case.target.prototypes.T - case.centre) / 0.05, dim=2)
    log_p = torch.log_softmax(case.embedding @ case.prototypes.T / 0.1, dim=2)
    pairs = [(v, g) for v in range(5) for g in range(2) if v != g]
    dino = sum(-(q[:, g] * log_p[:, v]).sum(1).mean() for v, g in pairs) / len(pairs)
    weights = (1 - torch.eye(5, 2, dtype=torch.float64)) / len(pairs)
    torch.testing.assert_close(call(case._replace(pair_weights=weights), "reference"), dino)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_differences_of_the_loss(kind, impl, small_chunks):
    case = wide(make_case(kind, images=3, views=2, dim=4, num_prototypes=7, k=3, biased=True))

    def loss(embedding, prototypes, bias):
        return call(case._replace(embedding=embedding, prototypes=prototypes, student_bias=bias), impl)

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in (*case[:2], case.student_bias)])


# ==== chunked against the reference ====


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(42, 6, 192, 3000), (39, 13, 64, 123)], ids=["252 rows, K 3000, D 192", "507 rows, K 123, D 64"]
)
def test_chunked_is_as_exact_as_torch(shape, kind, dtype, small_chunks):
    images, views, dim, num_prototypes = shape
    case = make_case(kind, images, views, dim=dim, num_prototypes=num_prototypes, dtype=dtype)
    assert_as_exact_as_torch(chunked.prototype_cross_entropy, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_is_as_exact_as_torch_with_a_bias_and_rows_2048_wide(kind, dtype, small_chunks):
    """What a plain MLP straight to K logits asks for."""
    case = make_case(kind, 9, 3, dim=2048, num_prototypes=123, dtype=dtype, biased=True)
    assert_as_exact_as_torch(chunked.prototype_cross_entropy, case)


def test_a_bias_is_a_prototypes_offset():
    """The same as one more dimension, in which every row is 1."""
    case = wide(make_case("embedding", biased=True))
    ones = torch.ones(*case.embedding.shape[:2], 1, dtype=torch.float64)
    wider = case._replace(
        embedding=torch.cat([case.embedding, ones], 2),
        prototypes=torch.cat([case.prototypes, case.student_bias.unsqueeze(1)], 1),
        student_bias=None,
    )
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(call(case, impl), call(wider, impl))


@pytest.mark.parametrize(("kind", "dtype"), [("embedding", torch.float32), ("topk", torch.bfloat16)])
def test_chunked_is_as_exact_as_torch_with_65536_prototypes(kind, dtype):
    case = make_case(kind, images=9, views=3, dim=256, num_prototypes=65536, k=64, dtype=dtype)
    assert_as_exact_as_torch(chunked.prototype_cross_entropy, case)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    images=st.integers(1, 9),
    views=st.integers(1, 5),
    targets=st.integers(1, 3),
    dim=st.integers(1, 20),
    num_prototypes=st.integers(1, 40),
    k=st.integers(1, 40),
    student_temp=st.floats(0.02, 5),
    teacher_temp=st.floats(0.02, 5),
    rows=st.integers(1, 40),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunked_is_the_reference_at_any_shape_and_temperature(rows, **arguments):
    case = wide(make_case(**arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
        patch.setattr(chunked, "FEWEST_ROWS", rows)
        found = outcome(chunked.prototype_cross_entropy, case)
    for ours, truth in zip(found, outcome(reference.prototype_cross_entropy, case), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_pair_weights_by_image(small_chunks):
    case = wide(make_case("embedding"))
    weights = torch.rand(5, 4, 2, dtype=torch.float64)
    each = [
        call(case._replace(embedding=case.embedding[i : i + 1], target=case.target.images(i, i + 1), pair_weights=w))
        for i, w in enumerate(weights)
    ]
    whole = call(case._replace(pair_weights=weights))
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_weights_of_either_sign_and_rows_of_none(small_chunks):
    """Used as given: a view whose weights sum to zero still has a gradient."""
    weights = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 0.5], [-1.0, 0.0]], dtype=torch.float64)
    case = wide(make_case("embedding"))._replace(pair_weights=weights)
    found, truth = (outcome(f.prototype_cross_entropy, case) for f in (chunked, reference))
    torch.testing.assert_close(found, truth)
    assert found[1][:, 0].eq(0).all() and found[1][:, 1].ne(0).any()


def test_student_and_teacher_may_differ_in_width():
    case = wide(make_case("embedding", dim=24, teacher_dim=10))
    torch.testing.assert_close(call(case), call(case, "reference"))


# ==== gradients: who gets them, and how they are scaled ====


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradient_scales_and_may_come_twice(kind):
    case = make_case(kind)
    once = outcome(chunked.prototype_cross_entropy, case)
    thrice = outcome(chunked.prototype_cross_entropy, case, upstream=-3.0)
    torch.testing.assert_close(thrice[1:], [-3 * g for g in once[1:]])

    embedding, prototypes = (t.clone().requires_grad_() for t in case[:2])
    loss = call(case._replace(embedding=embedding, prototypes=prototypes))
    for _ in range(2):
        first = torch.autograd.grad(2 * loss, [embedding, prototypes], retain_graph=True)
        torch.testing.assert_close([g.double() for g in first], [2 * g for g in once[1:]])


def test_only_what_asks_for_a_gradient_gets_one():
    case = make_case("embedding")
    full = outcome(chunked.prototype_cross_entropy, case)
    for name, expected in (("embedding", full[1]), ("prototypes", full[2])):
        asked = getattr(case, name).clone().requires_grad_()
        call(case._replace(**{name: asked})).backward()
        torch.testing.assert_close(asked.grad.double(), expected)
    assert not call(case).requires_grad


def test_no_gradient_reaches_the_target():
    case = make_case("embedding")
    teacher = case.target.embedding.clone().requires_grad_()
    student = case.embedding.clone().requires_grad_()
    for impl in ("chunked", "reference"):
        call(case._replace(embedding=student, target=replace(case.target, embedding=teacher)), impl).backward()
        assert student.grad is not None and teacher.grad is None


def test_gradients_pass_through_normalisation_and_weight_norm():
    """Left to torch: the chain through both is as in the reference."""
    case = wide(make_case("topk"))
    grads = []
    for impl in ("chunked", "reference"):
        raw = 3 * case.embedding.clone().requires_grad_()
        direction, gain = case.prototypes.clone().requires_grad_(), torch.full((50, 1), 1.3, dtype=torch.float64)
        gain.requires_grad_()
        effective = gain * normalize(direction, dim=1)
        loss = call(case._replace(embedding=normalize(raw, dim=2), prototypes=effective), impl)
        grads.append(torch.autograd.grad(loss, [raw, direction, gain]))
    torch.testing.assert_close(*grads)


def test_gradients_have_their_inputs_dtype():
    case = make_case("embedding", dtype=torch.bfloat16)
    embedding = case.embedding.clone().requires_grad_()
    prototypes = case.prototypes.float().requires_grad_()
    loss = call(case._replace(embedding=embedding, prototypes=prototypes))
    loss.backward()
    assert (loss.dtype, embedding.grad.dtype, prototypes.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_cpu_autocast_does_not_lower_the_precision(impl):
    case = make_case("embedding", images=20, dim=64)
    with torch.autocast("cpu", torch.bfloat16):
        under = call(case, impl)
    torch.testing.assert_close(under, call(case, impl))


# ==== arguments ====


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": torch.zeros(5, 24)}, "student_embedding must be"),
        ({"embedding": torch.zeros(5, 4, 23)}, "student_embedding must be"),
        ({"embedding": torch.zeros(0, 4, 24)}, "nothing to average"),
        ({"embedding": torch.zeros(6, 4, 24)}, "5 images and 50 prototypes, the student 6 and 50"),
        ({"prototypes": torch.zeros(51, 24)}, "5 images and 50 prototypes, the student 5 and 51"),
        ({"pair_weights": torch.ones(2, 4)}, r"pair_weights must be \(V, G\) = \(4, 2\)"),
        ({"centre": torch.ones(49)}, "centre must be"),
        ({"student_temp": 0.0}, "student_temp must be positive"),
        ({"teacher_temp": float("nan")}, "teacher_temp must be positive"),
        ({"pair_weights": torch.ones(4, 2, device="meta")}, "one device"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        call(make_case("embedding")._replace(**change))


def test_targets_that_do_not_fit():
    with pytest.raises(ValueError, match="EmbeddingTarget needs"):
        EmbeddingTarget(torch.zeros(5, 2, 8), torch.zeros(50, 9))
    with pytest.raises(ValueError, match="TopKTarget needs"):
        TopKTarget(torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 3), (0.04, 0.07), 50)
    with pytest.raises(ValueError, match="DenseTarget needs"):
        DenseTarget(torch.zeros(5, 50))
    with pytest.raises(ValueError, match="unknown impl 'fused'"):
        call(make_case("dense"), impl="fused")


def test_auto_picks_by_size():
    case = make_case("dense", num_prototypes=10)
    assert prototype_ce.choose_impl(case.embedding, case.prototypes, case.target) == "reference"
    large = case.prototypes.new_zeros(1 << 16, 24)
    assert prototype_ce.choose_impl(case.embedding, large, case.target) == "chunked"


def test_target_moves_between_devices():
    target = make_case("topk").target.to("meta")
    assert target.device.type == target.tail.device.type == "meta" and target.ids.dtype == torch.int64


# ==== memory ====


def test_chunked_never_holds_all_rows_by_all_prototypes():
    """The profiler's count of every allocation, beside inputs and gradients: one chunk, and no more for more images."""
    from torch.profiler import ProfilerActivity, profile

    peaks = {}
    for images in (8, 64):
        case = make_case("embedding", images=images, views=10, dim=16, num_prototypes=4096)
        embedding, prototypes = (t.requires_grad_() for t in case[:2])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            call(case._replace(embedding=embedding, prototypes=prototypes)).backward()
        held = peak = 0
        for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks[images] = peak - 4 * (embedding.numel() + prototypes.numel())
    logits = 4 * 64 * 10 * 4096
    assert peaks[64] < 1.2 * chunked.CHUNK_BYTES["cpu"] < logits
    assert peaks[64] - peaks[8] < 8 << 20
