"""RoB (2301.09451) as its authors released it: the loss and gradients of every variant against a plain double loop in float64, on
made-up targets, on a store's and on the teacher's.

    L = mean over the pairs of mean_b -sum_k q[b,g,k] log p[b,v,k],  p = softmax(s / .1)

A global crop meets the target of its own view, a local one every target; SwAV's one target meets all crops.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig, ViewLoader
from rob.student_train.config import PairingConfig
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import Objective, ObjectiveConfig, build_objective
from rob.student_train.presets import PRESETS
from rob.student_train.targets.branch import RunContext, TargetBranch
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.online import Online
from rob.student_train.targets.pairing import plan_views
from rob.student_train.targets.space import TargetSpace
from rob.teacher_cache.teachers import load_teacher
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint

IMAGES, LOCALS, FEATURES, DIM, PROTOTYPES = 6, 8, 20, 8, 12
CPU = torch.device("cpu")


class Variant(NamedTuple):
    """What papers.md has of it."""

    preset: str
    temp: float
    targets: int
    head: str
    rounds: int = 0
    norm: bool = False
    changes: Mapping[str, Any] = MappingProxyType({})


MLP = {"head_type": "mlp", "norm_last_layer": None}
VARIANTS = {
    "dino": Variant("rob-dino", 0.07, 2, "dino"),
    "dino-mlp": Variant("rob-dino", 0.07, 2, "mlp", changes=MLP),
    "dino-mlp-cnn": Variant("rob-dino", 0.07, 2, "mlp", norm=True, changes=MLP),
    "swav": Variant("rob-swav", 0.03, 1, "swav", 3, norm=True),
    "swav-vit": Variant("rob-swav", 0.03, 1, "swav", 3),
    "swav-softmax": Variant("rob-swav", 0.03, 1, "swav", changes={"sinkhorn_iterations": 0}),
    "swav-mlp": Variant("rob-swav", 0.03, 1, "mlp", 3, norm=True, changes=MLP),
    "swav-teacher": Variant("rob-swav-teacher-prototypes", 0.03, 1, "frozen", 3, norm=True),
    "swav-teacher-vit": Variant("rob-swav-teacher-prototypes", 0.03, 1, "frozen", 3),
    "swav-teacher-softmax": Variant(
        "rob-swav-teacher-prototypes", 0.03, 1, "frozen", changes={"sinkhorn_iterations": 0}
    ),
    "msn": Variant("rob-msn", 0.025, 2, "mlp"),
    "msn-own-head": Variant("rob-msn", 0.025, 2, "msn", changes={"head_type": "projection"}),
    "ibot": Variant("rob-ibot", 0.07, 2, "dino"),
    "ibot-mlp": Variant("rob-ibot", 0.07, 2, "mlp-gelu", changes=MLP),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER = F.normalize(random(PROTOTYPES, DIM, seed=1), dim=1)


def built(variant: Variant, space: TargetSpace, impl: str = "auto") -> Objective:
    """The preset's objective in float64, but for smaller widths; away from its start."""
    torch.manual_seed(0)
    config: ObjectiveConfig = PRESETS[variant.preset].objective
    changes = {"head_norm": variant.norm, "hidden_dim": 16, "loss_impl": impl} | variant.changes
    objective = build_objective(replace(config, **changes), FEATURES, space, variant.targets).double()
    for number, (name, parameter) in enumerate(objective.named_parameters()):
        if name.startswith("head") or name.endswith("bias"):
            parameter.data.add_(0.3 * random(*parameter.shape, seed=100 + number))
    return objective


def pairing_of(variant: Variant) -> PairingConfig:
    return PairingConfig("same", variant.targets, LOCALS, step_globals=2)


def plain_logits(head: str, w: dict[str, Tensor], x: Tensor, norm: bool) -> Tensor:
    """(B, V, F) -> (B, V, K), each head as papers.md has it, from the weights by name."""
    shape, x = x.shape[:-1], x.flatten(0, -2)
    layers = sorted({int(name.split(".")[2]) for name in w if name.startswith("head") and w[name].ndim == 2})

    def linear(x: Tensor, number: int) -> Tensor:
        return x @ w[f"head.mlp.{layers[number]}.weight"].T + w[f"head.mlp.{layers[number]}.bias"]

    def batch_norm(x: Tensor, number: int) -> Tensor:
        name = f"head.mlp.{layers[number] + 1}"
        deviation = (x.var(0, unbiased=False) + 1e-5).sqrt()
        return (x - x.mean(0)) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"] if norm else x

    def rows(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    if head in ("dino", "msn"):
        x = rows(linear(F.gelu(linear(F.gelu(linear(x, 0)), 1)), 2))
        s = x @ (w["prototypes.weight_g"] * rows(w["prototypes.weight_v"])).T
    elif head == "swav":
        s = rows(linear(batch_norm(linear(x, 0), 0).relu(), 1)) @ w["prototypes.weight"].T
    elif head == "frozen":
        s = linear(batch_norm(linear(x, 0), 0), 1) @ w["prototypes.weight"].T
    else:
        x = F.gelu(linear(F.gelu(linear(x, 0)), 1)) if head == "mlp-gelu" else batch_norm(linear(x, 0), 0)
        s = x @ w["prototypes.weight"].T + w["prototypes.bias"]
    return s.unflatten(0, shape)


def plain_codes(t: Tensor, temp: float, rounds: int) -> Tensor:
    """(B, K) teacher's logits -> (B, K): SwAV's iteration as it is printed, rows at last; of 0 rounds a softmax."""
    q = torch.exp((t - t.max()) / temp)
    for _ in range(rounds):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q / q.sum(dim=1, keepdim=True)


def plain_loss(variant: Variant, s: Tensor, t: Tensor) -> Tensor:
    """s (B, 2 + L, K), t (B, G, K)."""
    q = [plain_codes(t[:, g], variant.temp, variant.rounds) for g in range(variant.targets)]
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for v in range(2 + LOCALS):
        for g in range(variant.targets):
            if variant.targets == 2 and v < 2 and v != g:
                continue  # a global crop meets its own view alone
            log_p = (s[:, v] / 0.1).log_softmax(dim=1)
            total, pairs = total + sum(-(q[g][b] * log_p[b]).sum() for b in range(len(s))) / len(s), pairs + 1
    assert pairs == (18 if variant.targets == 2 else 10)
    return total / pairs


def weights_of(objective: Objective) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in objective.named_parameters()}


def exact(weights: Tensor) -> Tensor:
    """The plan's weights, which are float32, as the fractions that they stand for."""
    found = (weights > 0).double() / (weights > 0).sum()
    torch.testing.assert_close(weights.double(), found, rtol=1e-6, atol=0)
    return found


def made_up(variant: Variant) -> tuple[Tensor, Tensor, TargetSpace]:
    """Features (B, V, F), teacher's rows (B, G, D), and of what they are."""
    rows = F.normalize(random(IMAGES, variant.targets, DIM, seed=2), dim=-1)
    space = TargetSpace(DIM, PROTOTYPES, True, 0.1, prototypes=TEACHER)
    return random(IMAGES, 2 + LOCALS, FEATURES, seed=3), rows, space


def agrees(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients(name, impl):
    variant = VARIANTS[name]
    features, rows, space = made_up(variant)
    objective, features = built(variant, space, impl), features.requires_grad_()
    weights = exact(plan_views(pairing_of(variant), cached_views=4, epoch=0).pair_weights)
    before = weights_of(objective)
    loss = objective(features, EmbeddingTarget(rows, TEACHER), weights)
    loss.backward()
    if variant.head in ("mlp", "mlp-gelu"):  # a last layer is no set of directions
        assert torch.equal(before["prototypes.weight"], weights_of(objective)["prototypes.weight"])

    w, x = weights_of(objective), features.detach().clone().requires_grad_()  # SwAV's rows are unit by now
    expected = plain_loss(variant, plain_logits(variant.head, w, x, variant.norm), rows @ TEACHER.T)
    expected.backward()
    agrees(loss, expected)
    agrees(features.grad, x.grad)
    if variant.head == "frozen":  # made in float32
        torch.testing.assert_close(w["prototypes.weight"].detach(), TEACHER, rtol=0, atol=1e-7)
    learned = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert ("prototypes.weight" in learned) == (variant.head in ("swav", "mlp", "mlp-gelu"))
    for parameter, p in objective.named_parameters():
        if parameter in learned:
            agrees(p.grad, w[parameter].grad)


# ==== through a store, and online ====

LOADER = LoaderConfig("torch", batch_size=IMAGES, workers=1)


def step(branch: TargetBranch, variant: Variant, data, epoch: int) -> tuple[Tensor, Objective]:
    """The loss of an epoch's one step on made-up features."""
    plan = plan_views(pairing_of(variant), branch.views, epoch)
    objective, order = built(variant, branch.space), np.arange(IMAGES)
    views = ViewLoader(data, branch.recipe, branch.seed, LOADER).epoch(order, branch.view_sets(plan))
    with branch.targets(order, IMAGES, plan) as target_of:
        (batch,) = views
        target = target_of(batch)
    target = replace(target, embedding=target.embedding.double(), prototypes=target.prototypes.double())
    return objective(made_up(variant)[0], target, exact(plan.pair_weights)), objective


@pytest.mark.parametrize(("name", "epoch"), [("dino", 0), ("swav", 1)])
def test_through_a_store_and_online(name, epoch, setup):
    data, teacher, path = setup
    variant, store = VARIANTS[name], TargetStore.open(path)
    live = Online(load_teacher(teacher), PRESETS[variant.preset].drawn(), 4, 32)
    rows, prototypes = torch.from_numpy(store.read(0, IMAGES)["embedding"]).double(), torch.from_numpy(store.prototypes)
    columns = [(epoch * variant.targets + g) % 4 for g in range(variant.targets)]
    cached, objective = step(Cached(path).open(RunContext(data, CPU)), variant, data, epoch)
    s = plain_logits(variant.head, weights_of(objective), made_up(variant)[0], variant.norm)
    agrees(cached, plain_loss(variant, s, rows[:, columns] @ prototypes.double().T))
    if variant.preset.startswith("rob-dino"):  # the store is of its recipe
        online, _ = step(live.open(RunContext(data, CPU, seed=store.manifest.seed)), variant, data, epoch)
        torch.testing.assert_close(online, cached, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    data, teacher = tiny_beton(folder, IMAGES), tiny_teacher_checkpoint(folder, prototypes=PROTOTYPES, dim=DIM)
    settings = {"views": 4, "encoding": Encoding("embedding", "float32"), "loader": LOADER}
    tiny_store(folder / "t.zarr", data, teacher, recipe=PRESETS["rob-dino"].drawn(), **settings)
    return data, teacher, Path(folder / "t.zarr")
