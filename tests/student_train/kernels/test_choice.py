"""Which implementation "auto" takes, with the device mocked; and what the fused forms keep and cut."""

import gc

import pytest
import torch

from rob.student_train.kernels import choice, frozen, products

GPU = torch.device("cuda", 0)
HALF = torch.bfloat16


@pytest.fixture
def capability(monkeypatch):
    """Sets the compute capability of a GPU that is not there."""
    monkeypatch.setattr(choice, "_measured", {})
    monkeypatch.setattr(choice, "_triton", lambda: True)
    monkeypatch.setattr(choice, "_memory", lambda device: 80 << 30)

    def give(*found: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)

    give(9, 0)
    return give


@pytest.mark.parametrize("width", [64, 256, 384, 2048])
def test_every_width_takes_a_form_that_multiplies_in_the_autocast_dtype(capability, width):
    assert choice.fastest(GPU, HALF, 2560, 65536, width) == "triton"


def test_what_has_no_tensor_cores_to_use_takes_the_librarys_product(capability):
    assert choice.fastest(GPU, torch.float32, 2560, 65536, 256) == "chunked"  # float32, TF32 not allowed
    assert choice.fastest(GPU, torch.float16, 2560, 65536, 256) == "chunked"
    capability(7, 5)
    assert choice.fastest(GPU, HALF, 2560, 65536, 256) == "chunked"


def test_small_work_and_other_devices(capability):
    assert choice.fastest(GPU, HALF, 64, 1000, 256) == "reference"
    assert choice.fastest(torch.device("cpu"), HALF, 2560, 65536, 256) == "chunked"
    assert not choice.has_kernels(GPU, torch.float64) and not choice.has_kernels(torch.device("cpu"), HALF)


def test_what_was_measured_on_such_a_gpu_decides_by_the_most_similar_size(capability):
    sizes = [choice.Measured(65536, 256, "triton"), choice.Measured(4096, 256, "chunked")]
    choice.use_measured((9, 0), sizes)
    assert [choice.fastest(GPU, HALF, 15360, k, 384) for k in (3000, 8192, 32768, 300000)] == [
        "chunked",
        "chunked",
        "triton",
        "triton",
    ]
    capability(8, 0)
    assert choice.fastest(GPU, HALF, 15360, 4096, 256) == "triton", "another GPU's figures do not count"


def test_the_plain_form_up_to_where_an_h200_was_faster_with_it_and_memory_allows(capability, monkeypatch):
    sizes = [(4096, 256), (4096, 384), (65536, 256), (65536, 2048), (262144, 256)]
    assert [choice.fastest(GPU, HALF, 2560, *size) for size in sizes] == ["reference", "reference", *["triton"] * 3]
    monkeypatch.setattr(choice, "_memory", lambda device: 4 << 30)
    assert choice.fastest(GPU, HALF, 2560, 4096, 256) == "triton"


# ==== what is computed once of a frozen matrix ====


def test_a_frozen_matrix_is_cast_once_until_it_changes_or_goes():
    matrix = torch.randn(5, 3)
    first = frozen.cast_of(matrix, HALF)
    assert frozen.cast_of(matrix, HALF) is first and torch.equal(first, matrix.bfloat16())
    norm = frozen.largest_norm(matrix)
    assert frozen.largest_norm(matrix) is norm
    torch.testing.assert_close(norm, matrix.norm(dim=1).max())
    matrix.mul_(2)
    assert torch.equal(frozen.cast_of(matrix, HALF), matrix.bfloat16())
    torch.testing.assert_close(frozen.largest_norm(matrix), 2 * norm)
    kept = len(frozen._kept)
    del matrix
    gc.collect()
    assert len(frozen._kept) < kept


def test_what_gets_a_gradient_is_not_kept():
    matrix = torch.randn(5, 3, requires_grad=True)
    assert frozen.cast_of(matrix, HALF) is not frozen.cast_of(matrix, HALF)
    with torch.inference_mode():
        hidden = torch.randn(5, 3)
        assert frozen.cast_of(hidden, HALF) is not frozen.cast_of(hidden, HALF)


# ==== products in parts ====


@pytest.mark.parametrize(("m", "k", "n", "parts"), [
    (3072, 65536, 256, 8),  # 48 tiles for 132 processors
    (3072, 65536, 2048, 1),
    (3072, 4096, 256, 4),  # no part below 1024
    (3072, 65537, 256, 1),  # parts would not be of one size
    (3072, 65536 + 8, 256, 1),  # nor aligned
])  # fmt: skip
def test_a_long_sum_is_cut_until_all_processors_have_a_share(m, k, n, parts):
    assert products.parts_of(m, k, n, 132) == parts


def test_parts_add_up(monkeypatch):
    monkeypatch.setattr(products, "parts_of", lambda *_: 4)
    a, b = torch.randn(6, 80)[:, :64], torch.randn(64, 3)
    torch.testing.assert_close(products.long_product(a, b).sum(0), a @ b)
    half = products.long_product(a.bfloat16(), b.bfloat16()).sum(0)
    torch.testing.assert_close(half, a.bfloat16().float() @ b.bfloat16().float())
