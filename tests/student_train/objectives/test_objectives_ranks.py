"""Two ranks with half a batch each are one rank with all of it: losses, gradients, queues and centres, for every objective."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.targets.space import TargetSpace
from support.objectives import OF_VIEWS
from support.ranks import on_ranks

IMAGES, VIEWS, TARGETS, FEATURES, DIM, PROTOTYPES, STEPS = 8, 2, 2, 20, 8, 12, 4
CASES = {
    "embedding": {},
    "simreg": {},
    "moco": {"queue": 20},
    "seed": {"queue": 20, "teacher_temp": 0.1},
    "disco": {"queue": 20},
    "dino": {"centre_targets": "running"},
    "ibot": {"sinkhorn": "batch"},
    "swav": {"queue": 13},  # an odd number of rows for two ranks to share
    "msn": {"sinkhorn": "batch", "mean_entropy": 1.0},
}


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def steps(name: str, rank: int | None) -> dict[str, Tensor]:
    """Losses (steps,), the last gradients and the state, of a rank's half of each batch, or of all of it."""
    torch.manual_seed(0)
    space = TargetSpace(DIM, PROTOTYPES, True, 0.07, prototypes=unit(PROTOTYPES, DIM, seed=1))
    config = ObjectiveConfig(name, hidden_dim=16, bottleneck=10, head_norm=False, **CASES[name])
    objective = build_objective(config, FEATURES, space)
    for layer in objective.head.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5)
    weights = torch.eye(2) / 2 if name == "disco" else torch.tensor([[0.1, 0.3], [0.4, 0.2]])
    half = slice(None) if rank is None else slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    found = {"losses": []}
    for step in range(STEPS):
        rows = 4 * unit(IMAGES, VIEWS, FEATURES, seed=10 + step)[half]
        target = EmbeddingTarget(unit(IMAGES, TARGETS, DIM, seed=20 + step)[half], space.prototypes)
        objective.zero_grad()
        loss = objective(rows, target, weights)
        loss.backward()
        found["losses"].append(loss.detach())
    found["losses"] = torch.stack(found["losses"])
    found |= {f"grad.{n}": p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return found | {f"state.{n}": torch.as_tensor(value) for n, value in objective.state_dict().items()}


def _rank(rank: int, folder: str) -> None:
    torch.save({name: steps(name, rank) for name in CASES}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    on_ranks(_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_VIEWS)
def test_two_ranks_are_one_batch(halves, name):
    whole, (first, second) = steps(name, None), (half[name] for half in halves)
    assert len(whole) > 3
    for part, expected in whole.items():
        if part.startswith("state.") and "queue.rows" in part:  # the joined batch is in another order
            torch.testing.assert_close(first[part].sort(0).values, expected.sort(0).values, rtol=1e-5, atol=1e-6)
            assert torch.equal(first[part], second[part])
        elif part.startswith("state."):
            torch.testing.assert_close(first[part], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(first[part], second[part])
        else:  # what DistributedDataParallel does to gradients
            mean = (first[part] + second[part]) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6, msg=lambda text, p=part: f"{p}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco", "dino", "swav", "msn"])
def test_a_rank_alone_would_say_something_else(halves, name):
    """So that the agreement above is of the exchange between ranks."""
    alone, half = steps(name, 0), halves[0][name]
    assert not torch.allclose(alone["losses"], half["losses"], rtol=1e-3)
