"""Sinkhorn's offsets: against SwAV's own loop in float64, and what balance they reach."""

import pytest
import torch
from torch.nn.functional import normalize

from rob.student_train.kernels import DenseTarget, EmbeddingTarget, prototype_cross_entropy, sinkhorn, sinkhorn_offsets
from rob.student_train.kernels.entropy import mean_entropy as fused
from rob.student_train.kernels.reference import mean_entropy, target_probabilities
from support.prototype_ce_cases import make_case, topk_target, wide


def swav(logits: torch.Tensor, temp: float, iterations: int) -> torch.Tensor:
    """facebookresearch/swav main_swav.py, distributed_sinkhorn, on one rank; (R, K) rows summing to one."""
    q = torch.exp(logits / temp).t()
    num_prototypes, num_rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= num_rows
    return (q * num_rows).t()


def teacher(images: int = 20, num_prototypes: int = 37, dtype=torch.float64) -> EmbeddingTarget:
    random = torch.Generator().manual_seed(0)
    embedding, prototypes = (torch.randn(*shape, generator=random) for shape in ((images, 2, 16), (num_prototypes, 16)))
    return EmbeddingTarget(normalize(embedding, dim=2).to(dtype), normalize(prototypes, dim=1).to(dtype))


@pytest.mark.parametrize("tile", [5, 8192])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_offsets_are_swavs_iteration(iterations, tile, monkeypatch):
    monkeypatch.setattr(sinkhorn, "TILE", tile)
    target = teacher()
    logits = target.embedding @ target.prototypes.T
    exact = swav(logits.flatten(0, 1), 0.05, iterations).view_as(logits)
    for form in (target, DenseTarget(logits)):
        offsets = sinkhorn_offsets(form, 0.05, iterations)
        torch.testing.assert_close(torch.softmax(logits / 0.05 + offsets.column, dim=2), exact)
        torch.testing.assert_close(target_probabilities(form, 0.05, offsets.centre), exact)


@pytest.mark.parametrize("tile", [5, 8192])
def test_offsets_from_probabilities_are_msns_iteration(tile, monkeypatch):
    """msn's distributed_sinkhorn takes a softmax for the matrix, and goes on as SwAV's."""
    monkeypatch.setattr(sinkhorn, "TILE", tile)
    target = teacher()
    logits = target.embedding @ target.prototypes.T
    exact = swav(torch.softmax(logits.flatten(0, 1) / 0.05, dim=1).log(), 1.0, 3).view_as(logits)
    offsets = sinkhorn_offsets(target, 0.05, start="probabilities")
    torch.testing.assert_close(torch.softmax(logits / 0.05 + offsets.column, dim=2), exact)
    assert (exact - swav(logits.flatten(0, 1), 0.05, 3).view_as(logits)).abs().max() > 1e-3


def test_the_loss_takes_them_as_a_centre():
    case = wide(make_case("embedding"))
    offsets = sinkhorn_offsets(case.target, 0.05)
    logits = case.target.embedding @ case.target.prototypes.T
    q = swav(logits.flatten(0, 1), 0.05, 3).view_as(logits)
    log_p = torch.log_softmax(case.embedding @ case.prototypes.T / 0.1, dim=2)
    exact = -(case.pair_weights * torch.einsum("bvk,bgk->bvg", log_p, q)).sum() / len(log_p)
    loss = prototype_cross_entropy(
        *case[:3], student_temp=0.1, teacher_temp=0.05, centre=offsets.centre, pair_weights=case.pair_weights
    )
    torch.testing.assert_close(loss, exact)


def test_many_iterations_use_every_prototype_alike():
    target = teacher(images=100)
    q = target_probabilities(target, 0.2, sinkhorn_offsets(target, 0.2, 100).centre).flatten(0, 1)
    torch.testing.assert_close(q.sum(0), torch.full((37,), 200 / 37, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(200, dtype=torch.float64))


def test_cold_logits_in_float16_do_not_overflow():
    """exp(25 / 0.04) is beyond float64; SwAV's own loop divides inf by inf."""
    target = teacher(dtype=torch.float16)
    target = EmbeddingTarget(target.embedding * 25, target.prototypes)
    column = sinkhorn_offsets(target, 0.04).column
    assert column.dtype == torch.float32
    assert torch.isfinite(column).all()


def test_autocast_does_not_reach_the_offsets():
    target = teacher(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = sinkhorn_offsets(target, 0.05).column
    torch.testing.assert_close(under, sinkhorn_offsets(target, 0.05).column)


def test_a_queue_is_further_images():
    """Its rows sway the balance, and only the batch's offsets matter."""
    target = teacher(images=30)
    batch = target.images(0, 10)
    with_queue = sinkhorn_offsets(target, 0.05)
    assert not torch.allclose(with_queue.column, sinkhorn_offsets(batch, 0.05).column)
    exact = swav((target.embedding @ target.prototypes.T).flatten(0, 1), 0.05, 3)[:20].view(10, 2, 37)
    torch.testing.assert_close(target_probabilities(batch, 0.05, with_queue.centre), exact)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="not topk"):
        sinkhorn_offsets(topk_target(torch.randn(3, 2, 9), 4, [0.05]), 0.05)  # type: ignore[arg-type]
    for temp, iterations in ((0.0, 3), (0.05, 0)):
        with pytest.raises(ValueError, match="positive temperature"):
            sinkhorn_offsets(teacher(), temp, iterations)
    with pytest.raises(ValueError, match="unknown start 'logits' of Sinkhorn; known: exponentials, probabilities"):
        sinkhorn_offsets(teacher(), 0.05, start="logits")


# ==== MSN's mean entropy ====


def test_mean_entropy_is_that_of_the_mean_prediction():
    embedding, prototypes = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    p = torch.softmax(embedding @ prototypes.T / 0.3, dim=2).mean((0, 1))
    torch.testing.assert_close(mean_entropy(embedding, prototypes, 0.3), torch.distributions.Categorical(p).entropy())
    same = torch.zeros(11, 5, dtype=torch.float64)
    torch.testing.assert_close(mean_entropy(embedding, same, 0.3).exp(), torch.tensor(11.0, dtype=torch.float64))


def test_mean_entropy_knows_a_bias():
    embedding, prototypes = torch.randn(4, 3, 5).double(), torch.randn(11, 5).double()
    bias = torch.randn(11).double()
    p = torch.softmax((embedding.flatten(0, 1) @ prototypes.T + bias) / 0.3, dim=1).mean(0)
    expected = torch.distributions.Categorical(p).entropy()
    for found in (mean_entropy(embedding, prototypes, 0.3, bias), fused(embedding, prototypes, 0.3, bias=bias)):
        torch.testing.assert_close(found, expected)


def test_mean_entropy_has_gradients_where_a_prototype_is_never_used():
    embedding = torch.ones(4, 2, requires_grad=True)
    prototypes = torch.tensor([[1.0, 1.0], [-1000.0, -1000.0]])
    mean_entropy(embedding, prototypes, 0.1).backward()
    assert torch.isfinite(embedding.grad).all()
