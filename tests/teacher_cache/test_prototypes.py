"""Fitted prototypes: balanced, repeatable, bounded in memory, and right where the answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rob.common.errors import MisuseError
from rob.common.store.encodings import Encoding, check_temperature
from rob.teacher_cache import prototypes as module
from rob.teacher_cache.asked import within_ladder
from rob.teacher_cache.prototypes import PrototypeConfig, balanced_assignment, fit_prototypes


def clusters(num: int, each: int, dim: int = 16, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Embeddings (num * each, dim) around ``num`` random directions, in random order, and the directions."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(num, dim, generator=generator), dim=1)
    embeddings = directions.repeat(each, 1) + noise * torch.randn(num * each, dim, generator=generator)
    return F.normalize(embeddings, dim=1)[torch.randperm(num * each, generator=generator)], directions


def test_it_finds_the_clusters_that_are_there() -> None:
    embeddings, directions = clusters(num=8, each=100)
    fit = fit_prototypes(lambda start, stop: embeddings[start:stop], 800, PrototypeConfig(16))
    assert (fit.prototypes @ directions.T).amax(dim=0).min() > 0.95
    assert fit.used == 1
    assert fit.balance > 0.9
    torch.testing.assert_close(fit.prototypes.norm(dim=1), torch.ones(16))


def test_no_prototype_is_left_unused_where_nine_in_ten_embeddings_are_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    crowd = 0.05 * torch.randn(1800, 16, generator=generator) + torch.eye(16)[0]
    rest = torch.randn(200, 16, generator=generator)
    embeddings = F.normalize(torch.cat([crowd, rest]), dim=1)[torch.randperm(2000, generator=generator)]
    fit = fit_prototypes(lambda start, stop: embeddings[start:stop], 2000, PrototypeConfig(64))
    assert fit.used == 1
    assert fit.balance > 0.98  # plain k-means .95; moving by soft shares .12


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ELEMENTS", 16 * 120)  # 120 embeddings of 16 dimensions
    monkeypatch.setattr(module, "BLOCK_ROWS", 3)


@pytest.mark.usefixtures("small_batches")
def test_half_precision_views_as_a_store_gives_them() -> None:
    embeddings, directions = clusters(num=6, each=100)
    store = embeddings.numpy().astype(np.float16).reshape(150, 4, 16)
    fit = fit_prototypes(lambda start, stop: store[start:stop], 150, PrototypeConfig(12))
    assert (fit.prototypes @ directions.T).amax(dim=0).min() > 0.95
    again = fit_prototypes(lambda start, stop: store[start:stop], 150, PrototypeConfig(12))
    assert torch.equal(fit.prototypes, again.prototypes)
    other = fit_prototypes(lambda start, stop: store[start:stop], 150, PrototypeConfig(12, seed=1))
    assert not torch.equal(fit.prototypes, other.prototypes)


@pytest.mark.usefixtures("small_batches")
def test_rows_may_lie_class_by_class() -> None:
    """Packed folders do: with batches of neighbouring rows, each would be forced over the prototypes of all classes."""
    _, directions = clusters(num=8, each=1)
    embeddings = F.normalize(
        directions.repeat_interleave(240, dim=0)
        + 0.1 * torch.randn(1920, 16, generator=torch.Generator().manual_seed(3)),
        dim=1,
    )
    fit = fit_prototypes(lambda start, stop: embeddings[start:stop], 1920, PrototypeConfig(16))
    nearest = (embeddings @ fit.prototypes.T).argmax(dim=1).reshape(8, 240)
    table = torch.stack([torch.bincount(row, minlength=16) for row in nearest])  # embeddings of a class at a prototype
    assert table.amax(dim=0).sum() > 0.95 * len(embeddings)
    assert fit.balance > 0.9


@pytest.mark.usefixtures("small_batches")
def test_a_pass_reads_a_bounded_number_of_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PASS_EMBEDDINGS_EACH", 10)
    embeddings, _ = clusters(num=6, each=1000)
    rows_read: list[int] = []

    def read(start: int, stop: int) -> Tensor:
        rows_read.append(stop - start)
        return embeddings[start:stop]

    fit = fit_prototypes(read, 6000, PrototypeConfig(30, epochs=4))
    assert (
        sum(rows_read) <= 1 + (1 + 4 + 1) * 10 * 30
    )  # one to see the shape; a pass for seeds, four epochs, one for figures
    assert fit.prototypes.shape == (30, 16)
    assert fit.used == 1


def test_the_temperature_follows_the_spread_of_the_embeddings() -> None:
    """Features squeezed into a cone, as after a ReLU, get a lower temperature and the same use of the prototypes."""
    embeddings, _ = clusters(num=32, each=40, noise=0.3)
    cone = F.normalize(embeddings + 3 * torch.eye(16)[0], dim=1)
    wide, narrow = (
        fit_prototypes(lambda start, stop, e=e: e[start:stop], len(embeddings), PrototypeConfig(32))
        for e in (embeddings, cone)
    )
    assert narrow.teacher_temp < wide.teacher_temp / 4
    assert narrow.used > 0.95
    assert narrow.balance > 0.95


@pytest.mark.parametrize("num", [0, 1, 26])
def test_too_many_or_too_few_for_the_data(num: int) -> None:
    embeddings, _ = clusters(num=10, each=10)
    with pytest.raises(MisuseError, match=f"`prototypes` {num} does not suit 100 embeddings: give from 2 to 25"):
        fit_prototypes(lambda start, stop: embeddings[start:stop], 100, PrototypeConfig(num))


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(2, 40),
    num=st.integers(2, 40),
    epsilon=st.sampled_from([0.005, 0.02, 0.05, 1.0]),
    offset=st.floats(-1, 1),
    seed=st.integers(0, 99),
)
def test_assignments_are_shares_of_each_embedding(
    batch: int, num: int, epsilon: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(batch, 8, generator=generator), dim=1)
    directions = F.normalize(torch.randn(num, 8, generator=generator), dim=1)
    similarity = embeddings @ directions.T + offset  # a common offset, as of features in a cone, changes nothing
    shares = balanced_assignment(similarity, epsilon)
    assert shares.isfinite().all()
    torch.testing.assert_close(shares.sum(dim=1), torch.full((batch,), 1 / batch))
    if epsilon < 0.05:
        return  # a share that float32 rounds to nothing can matter once a starved column is scaled up
    exact = (similarity.double() / epsilon).exp()
    exact = exact / exact.sum(dim=1, keepdim=True)
    for _ in range(3):
        exact = exact / exact.sum(dim=0, keepdim=True) / num
        exact = exact / exact.sum(dim=1, keepdim=True) / batch
    torch.testing.assert_close(shares.double(), exact, rtol=1e-3, atol=1e-6)


def test_assignments_give_every_prototype_the_same_share() -> None:
    similarity = F.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    shares = balanced_assignment(similarity + torch.linspace(0, 0.5, 8), epsilon=0.1, iterations=50)
    torch.testing.assert_close(shares.sum(dim=0), torch.full((8,), 1 / 8), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("fitted", "kept"), [(0.112, 0.1), (0.05, 0.05), (0.01, 0.025)])
def test_a_topk_store_gets_a_temperature_within_its_own_ladder(fitted, kept):
    """The tail's mass is known there alone, and the default training refuses others."""
    said: list[str] = []
    encoding = Encoding("topk", k=4)
    temp = within_ladder(encoding, fitted, said.append)
    assert temp == kept
    check_temperature(encoding.temps, temp)
    assert len(said) == (fitted != kept)
    assert within_ladder(Encoding("dense"), fitted, said.append) == fitted
