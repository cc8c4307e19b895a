"""The Triton kernels on CPU tensors, under Triton's interpreter: their numerics, not their speed, and not a GPU.

TRITON_INTERPRET has to be set before triton is first imported, so this file runs itself again in a process of its own.
"""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is a Linux package")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.slow
    def test_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from rob.student_train.kernels import (
        chunked,
        products,
        prototype_cross_entropy,
        reference,
        triton_ce,
        triton_kernels,
        triton_passes,
    )
    from support.interpreter import bfloat16_dots, scalars_index
    from support.launches import launches
    from support.prototype_ce_cases import KINDS, assert_as_exact_as_torch, errors, make_case, outcome, wide

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)

    @pytest.fixture(autouse=True)
    def repaired_interpreter(monkeypatch):
        scalars_index(monkeypatch)
        bfloat16_dots(monkeypatch)

    @pytest.fixture(params=[True, False], ids=["tiled", "library"])
    def form(request):
        return partial(triton_ce.prototype_cross_entropy, tiled=request.param)

    @pytest.fixture
    def small_chunks(monkeypatch):
        """Chunks of two images or so, so that there are several and the last is short; blocks of 64 rows; a product in parts."""
        monkeypatch.setattr(triton_ce, "SMALLEST_BUDGET", 1)
        monkeypatch.setattr(chunked, "FEWEST_ROWS", 12)
        monkeypatch.setattr(triton_ce, "LOGITS_BYTES", 1)
        monkeypatch.setattr(products, "FEWEST_PER_PART", 16)

    # ==== the kernels, against their references ====

    def scored(dtype, rows=37, d=50, k=333, length=1.0):
        case = make_case("embedding", rows, 1, dim=d, num_prototypes=k, dtype=dtype)
        offset = 0.3 * torch.randn(k)
        return (case.embedding[:, 0] * length).to(dtype).contiguous(), case.prototypes, offset

    @pytest.mark.parametrize("with_offset", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_exponentials(dtype, with_offset):
        query, keys, offset = scored(dtype)
        offset = offset if with_offset else None
        anchors = torch.linspace(-3, 12, len(query)) + 20 * (dtype == torch.float16)
        out = torch.full((len(query), 384), torch.nan, dtype=dtype)
        sums, exact_sums = triton_kernels.exponentials(query, keys, offset, anchors, 14.4, out[:, :333]).sum(1)
        wide_offset = None if offset is None else offset.double()
        lifted = anchors.double() - triton_kernels.lift(dtype)
        made, exact = reference.exponentials(query.double(), keys.double(), wide_offset, lifted, 14.4)
        torch.testing.assert_close(sums, out[:, :333].float().sum(1))
        torch.testing.assert_close(exact_sums.double(), exact, rtol=1e-4, atol=0)
        torch.testing.assert_close(out[:, :333].double(), made, rtol=2e-4 + torch.finfo(dtype).eps, atol=1e-7)
        assert out[:, 333:].isnan().all(), "nothing is written beside the rows"

    def test_log_sum_exp_of_rows_of_any_length_and_only_where_asked():
        query, keys, offset = scored(torch.float32, length=40.0)
        bounds = torch.full((len(query),), torch.inf)
        found = anchored(bounds, triton_kernels.log_sum_exp(query, keys, offset, bounds, 14.4))
        exact = reference.log_sum_exp(query.double(), keys.double(), offset.double(), 14.4)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
        bounds[:16] = 1.0
        again = anchored(bounds, triton_kernels.log_sum_exp(query, keys, offset, bounds, 14.4))
        assert torch.equal(again[16:], found[16:]) and torch.equal(again[:16], bounds[:16])

    def anchored(bounds, log_sums):
        return triton_passes.anchors(bounds, log_sums, triton_kernels.SAFE)

    def test_splits_of_a_log_sum_exp_add_up():
        log_sums = torch.randn(5, 200) * 50
        exact = torch.logsumexp(log_sums.double() * math.log(2), 0) / math.log(2)
        found = anchored(torch.full((200,), torch.inf), log_sums)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bounds_and_casts_of_rows(dtype):
        rows = torch.randn(37, 200)
        cast, lengths = triton_passes.row_bounds(rows, dtype)
        torch.testing.assert_close(
            cast.float(), rows, rtol=torch.finfo(dtype).eps, atol=1e-7
        )  # the interpreter cuts off
        torch.testing.assert_close(lengths, cast.float().norm(dim=1))
        again, bounds = triton_passes.row_bounds(cast, dtype, torch.tensor(3.0), torch.tensor(0.5), 2.0)
        assert again is cast
        torch.testing.assert_close(bounds, 2 * (3 * lengths + 0.5))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_softmax_rows(dtype, monkeypatch):
        monkeypatch.setattr(triton_kernels, "PASS_BLOCK", 64)
        query, keys, offset = scored(torch.float32)
        logits = 5 * query @ keys.T
        logits[3, :100] = -torch.inf
        out = torch.full((len(query), 384), torch.nan, dtype=dtype)
        sums, log_sums = torch.full((2, len(query)), torch.nan)
        triton_kernels.softmax_rows(logits, offset, 14.4, out[:, :333], sums, log_sums)
        p, exact = reference.softmax_rows(logits.double(), offset.double(), 14.4)
        torch.testing.assert_close(log_sums.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums, out[:, :333].float().sum(1))
        found = out[:, :333].double() * 2.0 ** -triton_kernels.lift(dtype)
        torch.testing.assert_close(found, p, rtol=2e-4 + torch.finfo(dtype).eps, atol=1e-10)
        assert out[:, 333:].isnan().all()

    # ==== the loss ====

    @pytest.mark.parametrize(("tiled", "most"), [(True, 21), (False, 16)], ids=["tiled", "library"])
    def test_few_launches(tiled, most, monkeypatch):
        """Forward and backward once the teacher's part is known: the host takes longer to launch them than a GPU to do them."""
        monkeypatch.setattr(products, "FEWEST_PER_PART", 16)
        case = make_case("embedding", 8, 3, dim=64, num_prototypes=512, centred=False)
        inputs = [t.clone().requires_grad_() for t in (case.embedding, case.prototypes)]
        step = partial(triton_ce.prototype_cross_entropy, tiled=tiled, dtype=torch.bfloat16)
        step(*inputs, *case[2:]).backward()
        with launches(monkeypatch) as found:
            step(*inputs, *case[2:]).backward()
        added = 2  # gradients that were there already
        assert sum(found.values()) - added <= most, found

    HALVES = [("embedding", torch.float16), *((kind, torch.bfloat16) for kind in KINDS)]

    @pytest.mark.parametrize(
        ("kind", "dtype", "biased"), [("embedding", torch.float32, False), *((*half, True) for half in HALVES)], ids=str
    )
    def test_as_exact_as_torch(kind, dtype, biased, form, small_chunks):
        """The slack: p and q are rounded one by one before their product with the values, torch rounds p - q."""
        case = make_case(kind, 12, 3, dim=48, teacher_dim=20, num_prototypes=320, dtype=dtype, biased=biased)
        assert_as_exact_as_torch(form, case, slack=3 if dtype == torch.float16 else 1.5)

    def test_rows_2048_wide_in_one_chunk(form):
        case = make_case("embedding", 5, 2, dim=2048, num_prototypes=60, dtype=torch.bfloat16, biased=True)
        assert_as_exact_as_torch(form, case, slack=1.5)

    @settings(max_examples=12, deadline=None)
    @given(
        kind=st.sampled_from(KINDS),
        images=st.integers(1, 8),
        views=st.integers(1, 5),
        targets=st.integers(1, 3),
        dim=st.integers(1, 40),
        num_prototypes=st.integers(1, 300),
        student_temp=st.floats(0.05, 5),
        teacher_temp=st.floats(0.05, 5),
        centred=st.booleans(),
        biased=st.booleans(),
        tiled=st.booleans(),
        seed=st.integers(0, 100),
    )
    def test_any_shape_and_temperature(tiled, **arguments):
        case = make_case(**arguments)
        truth = outcome(reference.prototype_cross_entropy, wide(case), upstream=3.0)
        found = outcome(partial(triton_ce.prototype_cross_entropy, tiled=tiled), case, upstream=3.0)
        scale = 1 / arguments["student_temp"]
        for ours, exact in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=2e-5, atol=2e-5 * scale)

    def test_rows_of_very_different_lengths(form):
        """Some within the safe bound and some far outside of it, where exponents relative to the bound would all underflow."""
        case = make_case("embedding", 10, 2, num_prototypes=140, student_temp=0.04, teacher_temp=0.04)
        lengths = torch.logspace(-1, 2.5, 10).view(10, 1, 1)
        target = type(case.target)(case.target.embedding * lengths, case.target.prototypes)
        case = case._replace(embedding=case.embedding * lengths, target=target)
        truth = outcome(reference.prototype_cross_entropy, wide(case))
        assert max(errors(outcome(form, case), truth)) < 1e-4

    def test_large_logits_do_not_overflow(form):
        case = make_case("embedding", dtype=torch.float16, student_temp=0.04, teacher_temp=0.04, num_prototypes=140)
        for scale in (25.0, 2000.0):
            scaled = case._replace(
                embedding=(case.embedding.float() * scale).half(), prototypes=(case.prototypes.float() * scale).half()
            )
            found = outcome(form, scaled)
            assert torch.isfinite(found[0])
            truth = outcome(reference.prototype_cross_entropy, wide(scaled))
            assert errors(found, truth)[0] < 1e-3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_logit_at_the_bound_underflows(dtype, form):
        """The worst that a bound allows: every prototype opposite to the row."""
        prototypes = torch.zeros(40, 24, dtype=dtype)
        prototypes[:, 0] = -1 - torch.arange(40) / 400
        case = make_case("embedding", num_prototypes=40, dtype=dtype, student_temp=0.03, centred=False)
        embedding = torch.zeros_like(case.embedding)
        embedding[..., 0] = 1.0
        case = case._replace(prototypes=prototypes, embedding=embedding)
        truth = outcome(reference.prototype_cross_entropy, wide(case))
        assert max(errors(outcome(form, case), truth)) < (1e-4 if dtype == torch.float32 else 1e-2)

    def test_backward_twice_and_only_what_asks(form, small_chunks):
        case = make_case("topk", 6, 3, num_prototypes=140, biased=True)
        full = outcome(form, case)
        for index, name in enumerate(("embedding", "prototypes", "student_bias"), start=1):
            asked = getattr(case, name).clone().requires_grad_()
            loss = form(*case._replace(**{name: asked}))
            for _ in range(2):
                (gradient,) = torch.autograd.grad(loss, [asked], retain_graph=True)
                torch.testing.assert_close(gradient.double(), full[index])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the row of nothing: log2 of zero
    @pytest.mark.parametrize("impl", ["triton"])
    def test_excluded_prototypes_and_rows_of_nothing(impl):
        """A whole first tile excluded is no NaN; a whole row is."""
        case = make_case("dense", num_prototypes=140)
        logits = case.target.logits.clone()
        logits[..., :130] = -torch.inf
        arguments = dict(student_temp=0.1, teacher_temp=0.05, centre=None, pair_weights=case.pair_weights, impl=impl)
        target = type(case.target)(logits)
        loss = prototype_cross_entropy(case.embedding, case.prototypes, target, **arguments)
        exact = prototype_cross_entropy(case.embedding, case.prototypes, target, **{**arguments, "impl": "reference"})
        torch.testing.assert_close(loss, exact)
        logits[2, 1] = -torch.inf
        with pytest.raises(FloatingPointError, match=r"target.logits\[\[2, 1\]\]"):
            prototype_cross_entropy(case.embedding, case.prototypes, target, **arguments)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("value", [float("nan"), -float("inf")])
    @pytest.mark.parametrize("name", ["embedding", "prototypes", "teacher"])
    def test_a_bad_row_is_a_loss_that_is_not_finite(name, value, form):
        case = make_case("embedding", images=2, views=2, num_prototypes=140)
        bad = (case.target.embedding if name == "teacher" else getattr(case, name)).clone()
        bad.view(-1)[30] = value
        if name == "teacher":
            case = case._replace(target=type(case.target)(bad, case.target.prototypes))
        else:
            case = case._replace(**{name: bad})
        assert not torch.isfinite(form(*case))

    def test_float16_gradients_survive_a_gradient_scaler(form):
        """Small gradients are scaled before they are rounded to float16."""
        case = make_case("embedding", images=4, num_prototypes=140, dtype=torch.float16, biased=True)
        weights = case.pair_weights * 1e-5
        exact = outcome(reference.prototype_cross_entropy, wide(case._replace(pair_weights=weights)), upstream=65536.0)
        found = outcome(form, case._replace(pair_weights=weights), upstream=65536.0)
        assert max(errors(found, exact)[1:]) < 5e-3
