"""The prototype cross-entropy on a GPU, against float64 on the CPU. Skipped where there is none."""

from functools import partial

import pytest
import torch

from rob.student_train.kernels import choice, chunked, prototype_cross_entropy, reference
from support.prototype_ce_cases import KINDS, Case, errors, make_case, outcome, wide

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and pytest -m gpu", allow_module_level=True)

triton_ce = pytest.importorskip("rob.student_train.kernels.triton_ce")
pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of errors relative to the truth's norm, given the operands as they are rounded: TF32's, bfloat16's and float16's own."""


@pytest.fixture(params=[True, False], ids=["tiled", "library"])
def form(request):
    return partial(triton_ce.prototype_cross_entropy, tiled=request.param)


@pytest.fixture(autouse=True)
def tf32():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def on_gpu(case: Case) -> Case:
    return Case(*(x.to("cuda") if hasattr(x, "to") else x for x in case))


def poison() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.full((1 << 26,), torch.nan, device="cuda")


def assert_close_to_float64(form, case: Case, limit: float) -> None:
    truth = outcome(reference.prototype_cross_entropy, wide(case))
    poison()
    found = [x.cpu() for x in outcome(form, on_gpu(case))]
    assert max(errors(found, truth)) < limit, errors(found, truth)
    poison()
    again = [x.cpu() for x in outcome(form, on_gpu(case))]
    if "TopK" not in type(case.target).__name__:  # whose rows are added up in any order
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True)), "the same inputs, the same bits"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_ragged_and_biased(dtype, kind, form):
    case = make_case(kind, 13, 5, dim=100, teacher_dim=60, num_prototypes=1003, dtype=dtype, biased=True)
    assert_close_to_float64(form, case, LIMITS[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_as_it_is_used_most(kind, form):
    case = make_case(kind, 40, 10, dim=256, num_prototypes=8192, dtype=torch.bfloat16)
    assert_close_to_float64(form, case, LIMITS[torch.bfloat16])


def test_rows_2048_wide(form):
    case = make_case("embedding", 20, 4, dim=2048, num_prototypes=1000, dtype=torch.bfloat16, biased=True)
    assert_close_to_float64(form, case, LIMITS[torch.bfloat16])


def test_several_chunks(form, monkeypatch):
    monkeypatch.setattr(triton_ce, "chunk_bytes", lambda device: 1)
    monkeypatch.setattr(triton_ce, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunked, "FEWEST_ROWS", 60)
    case = make_case("embedding", 33, 5, dim=128, num_prototypes=2048, dtype=torch.bfloat16, biased=True)
    assert_close_to_float64(form, case, LIMITS[torch.bfloat16])


def test_rows_of_very_different_lengths(form):
    case = make_case("embedding", 40, 5, num_prototypes=1400, dtype=torch.bfloat16, student_temp=0.04)
    lengths = torch.logspace(-1, 2.5, 40).view(40, 1, 1)
    case = case._replace(embedding=(case.embedding.float() * lengths).bfloat16())
    assert_close_to_float64(form, case, 2e-2)


@pytest.mark.parametrize("impl", ["auto", "triton", "chunked"])
def test_under_autocast_and_from_tensors_of_any_strides(impl):
    case = make_case("embedding", 64, 10, dim=64, num_prototypes=8192)
    case = Case(*(x.bfloat16().float() if isinstance(x, torch.Tensor) else x for x in case))
    truth = outcome(reference.prototype_cross_entropy, wide(case))
    given = on_gpu(case)

    def loss(embedding, prototypes, target, student_temp, teacher_temp, centre, pair_weights):
        with torch.autocast("cuda", torch.bfloat16):
            return prototype_cross_entropy(
                embedding.transpose(0, 1).contiguous().transpose(0, 1),
                prototypes.T.contiguous().T,
                target,
                student_temp=student_temp,
                teacher_temp=teacher_temp,
                centre=centre,
                pair_weights=pair_weights,
                impl=impl,
            )

    found = [x.cpu() for x in outcome(loss, given)]
    assert max(errors(found, truth)) < (3e-2 if impl == "auto" else 1e-2), errors(found, truth)


def test_auto_takes_a_form_with_kernels_where_the_logits_are_many():
    device, width = torch.device("cuda"), 64
    assert choice.fastest(device, torch.bfloat16, 640, 8192, width) == "reference"
    found = choice.fastest(device, torch.bfloat16, 640, 65536, width)
    assert found in ("triton", "chunked") and choice.has_kernels(device, torch.bfloat16)
