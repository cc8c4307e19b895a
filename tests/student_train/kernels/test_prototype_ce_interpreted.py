"""The Triton kernels on CPU tensors, under Triton's interpreter: their numerics, not their speed, and not a GPU.

TRITON_INTERPRET has to be set before triton is first imported, so this file runs itself again in a process of its own.
"""

import os
import subprocess
import sys

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
    import numpy as np
    import triton.language as tl
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from rob.student_train.kernels import prototype_cross_entropy, reference, triton_ce
    from support.interpreter import scalars_index
    from support.prototype_ce_cases import KINDS, assert_as_exact_as_torch, errors, make_case, outcome, wide

    @pytest.fixture(autouse=True)
    def bfloat16_dots(monkeypatch):
        """Triton 3.8's interpreter keeps bfloat16 as 16-bit patterns, and multiplies the patterns."""

        def floats(x):
            return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

        def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
            return TensorHandle(np.matmul(floats(a), floats(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        scalars_index(monkeypatch)

    @pytest.fixture(params=[1, 3], ids=["one split", "three splits"])
    def splits(request, monkeypatch):
        """Splits of `attend` over the prototypes, where there are that many times 128."""
        monkeypatch.setattr(triton_ce, "_split", lambda rows, k, device: 128 * -(-k // (128 * request.param)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_as_exact_as_torch(kind, dtype, splits):
        """The slack: p and q are rounded one by one before their product with the values, torch rounds p - q."""
        case = make_case(kind, images=12, views=3, dim=48, teacher_dim=20, num_prototypes=333, dtype=dtype)
        assert_as_exact_as_torch(triton_ce.prototype_cross_entropy, case, slack=1.5)

    @settings(max_examples=12)
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
        seed=st.integers(0, 100),
    )
    def test_any_shape_and_temperature(**arguments):
        case = make_case(**arguments)
        truth = outcome(reference.prototype_cross_entropy, wide(case), upstream=3.0)
        found = outcome(triton_ce.prototype_cross_entropy, case, upstream=3.0)
        scale = 1 / arguments["student_temp"]
        for ours, exact in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=2e-5, atol=2e-5 * scale)

    def test_large_logits_do_not_overflow():
        case = make_case("embedding", dtype=torch.float16, student_temp=0.04, teacher_temp=0.04, num_prototypes=140)
        for scale in (25.0, 2000.0):
            scaled = case._replace(
                embedding=(case.embedding.float() * scale).half(), prototypes=(case.prototypes.float() * scale).half()
            )
            found = outcome(triton_ce.prototype_cross_entropy, scaled)
            assert torch.isfinite(found[0])
            truth = outcome(reference.prototype_cross_entropy, wide(scaled))
            assert errors(found, truth)[0] < 1e-3

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the row of nothing: log2 of zero
    def test_excluded_prototypes_and_rows_of_nothing():
        """A whole first tile excluded is no NaN; a whole row is."""
        case = make_case("dense", num_prototypes=140)
        logits = case.target.logits.clone()
        logits[..., :130] = -torch.inf
        arguments = dict(
            student_temp=0.1, teacher_temp=0.05, centre=None, pair_weights=case.pair_weights, impl="triton"
        )
        target = type(case.target)(logits)
        loss = prototype_cross_entropy(case.embedding, case.prototypes, target, **arguments)
        exact = prototype_cross_entropy(case.embedding, case.prototypes, target, **{**arguments, "impl": "reference"})
        torch.testing.assert_close(loss, exact)
        logits[2, 1] = -torch.inf
        with pytest.raises(FloatingPointError, match=r"target.logits\[\[2, 1\]\]"):
            prototype_cross_entropy(case.embedding, case.prototypes, target, **arguments)

    def test_float16_gradients_survive_a_gradient_scaler():
        """Small gradients are scaled before they are rounded to float16."""
        case = make_case("embedding", images=16, num_prototypes=140, dtype=torch.float16)
        weights = case.pair_weights * 1e-5
        exact = outcome(reference.prototype_cross_entropy, wide(case._replace(pair_weights=weights)), upstream=65536.0)
        found = outcome(triton_ce.prototype_cross_entropy, case._replace(pair_weights=weights), upstream=65536.0)
        assert max(errors(found, exact)[1:]) < 5e-3
