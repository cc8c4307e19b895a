"""Every objective against its paper's formula written plainly in float64: the loss of two steps, and the gradients."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rob.student_train.kernels import DenseTarget, EmbeddingTarget, Target
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.targets.space import TargetSpace

IMAGES, VIEWS, TARGETS, FEATURES, DIM, PROTOTYPES, QUEUE = 7, 3, 2, 20, 8, 12, 24
TEACHER_TEMP = 0.07
CROSS = torch.tensor([[0.0, 0.3], [0.2, 0.1], [0.4, 0.0]])
SAME = torch.eye(TARGETS) / TARGETS


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


TEACHER_PROTOTYPES = unit(PROTOTYPES, DIM, seed=2) * 1.2
OWN_CENTRE = 0.1 * unit(PROTOTYPES, seed=4)
MEAN = 0.3 * unit(DIM, seed=3)
SPACE = TargetSpace(
    *(DIM, PROTOTYPES, True, TEACHER_TEMP),
    mean_embedding=MEAN,
    mean_logits=TEACHER_PROTOTYPES @ MEAN,
    centre=OWN_CENTRE,
    prototypes=TEACHER_PROTOTYPES,
)


def features(step: int, views: int = VIEWS) -> Tensor:
    return 4 * unit(IMAGES, views, FEATURES, seed=10 + step)


def teacher_rows(step: int) -> Tensor:
    """Bunched up, so that centres and balancing have something to do."""
    return F.normalize(unit(IMAGES, TARGETS, DIM, seed=20 + step) + unit(DIM, seed=9), dim=-1)


def target_of(step: int, kind: str = "embedding") -> Target:
    rows = teacher_rows(step)
    return (
        EmbeddingTarget(rows, TEACHER_PROTOTYPES) if kind == "embedding" else DenseTarget(rows @ TEACHER_PROTOTYPES.T)
    )


def teacher_logits(step: int) -> Tensor:
    return teacher_rows(step).double() @ TEACHER_PROTOTYPES.double().T


class Plain:
    """The student's head and prototypes in float64, for formulas that build a graph of their own."""

    def __init__(self, objective: nn.Module) -> None:
        self.mlp = deepcopy(objective.head.mlp).double()
        self.matrix = None
        if objective.prototypes is not None:
            self.matrix = objective.prototypes.matrix().detach().double().requires_grad_()

    def embed(self, rows: Tensor) -> Tensor:
        return F.normalize(self.mlp(rows.flatten(0, 1)), dim=1).unflatten(0, rows.shape[:2])

    def logits(self, rows: Tensor) -> Tensor:
        assert self.matrix is not None
        return self.embed(rows) @ self.matrix.T


def agree(objective: nn.Module, pair_weights: Tensor, formula, steps: int = 2, views: int = VIEWS, kind="embedding"):
    """The objective's loss and gradients by features, head and prototypes in each step are those of ``formula``.

    formula(plain, features (B, V, F) float64, step) -> loss. The weights stay the same from step to step.
    """
    for step in range(steps):
        rows = features(step, views).requires_grad_()
        loss = objective(rows, target_of(step, kind), pair_weights)
        plain, exact_rows = Plain(objective), rows.detach().double().requires_grad_()
        expected = formula(plain, exact_rows, step)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
        found = torch.autograd.grad(loss, [rows, objective.head.mlp[0].weight])
        exact = torch.autograd.grad(expected, [exact_rows, plain.mlp[0].weight], retain_graph=True)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def build(name: str, kind: str = "embedding", **settings) -> nn.Module:
    torch.manual_seed(0)
    config = ObjectiveConfig(name, hidden_dim=16, bottleneck=10, **settings)
    space = replace(SPACE, has_embedding=kind == "embedding")
    objective = build_objective(config, FEATURES, space, TARGETS)
    for layer in objective.head.mlp:  # DINO's start of .02 would leave all students' rows nearly one
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5)
    return objective


def cross_entropy(weights: Tensor, q: Tensor, student_logits: Tensor, temp: float) -> Tensor:
    """sum_{v,g} w mean_b -sum_k q log p, a pair at a time."""
    log_p = torch.log_softmax(student_logits / temp, dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    for v in range(weights.shape[0]):
        for g in range(weights.shape[1]):
            total = total - weights[v, g].double() * (q[:, g] * log_p[:, v]).sum(-1).mean()
    return total


# ==== dino, ibot ====


@pytest.mark.parametrize("kind", ["embedding", "dense"])
@pytest.mark.parametrize("name", ["dino", "ibot"])
@pytest.mark.parametrize("centre", [None, "none", "checkpoint", "calibration", "running"])
def test_dino_and_ibot(name, centre, kind):
    centres = {"checkpoint": OWN_CENTRE.double(), "calibration": TEACHER_PROTOTYPES.double() @ MEAN.double()}
    running = torch.zeros(PROTOTYPES, dtype=torch.float64)

    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        nonlocal running
        t = teacher_logits(step)
        c = running if centre == "running" else centres.get(centre, 0.0)
        running = 0.9 * running + 0.1 * t.mean((0, 1))
        return cross_entropy(CROSS, torch.softmax((t - c) / TEACHER_TEMP, dim=-1), plain.logits(rows), 0.1)

    agree(build(name, centre_targets=centre), CROSS, formula, steps=3, kind=kind)


def swav_sinkhorn(logits: Tensor, eps: float) -> Tensor:
    """main_swav.py, distributed_sinkhorn, on one rank: (R, K) -> rows summing to one."""
    q = torch.exp(logits / eps).t()
    num_prototypes, num_rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= num_rows
    return (q * num_rows).t()


@pytest.mark.parametrize("kind", ["embedding", "dense"])
def test_dino_with_sinkhorn_balances_all_views_together_as_dinov2(kind):
    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        t = teacher_logits(step)
        q = swav_sinkhorn(t.flatten(0, 1), TEACHER_TEMP).view_as(t)
        return cross_entropy(CROSS, q, plain.logits(rows), 0.1)

    agree(build("dino", sinkhorn="batch"), CROSS, formula, kind=kind)


# ==== swav ====


@pytest.mark.parametrize("kind", ["embedding", "dense"])
def test_swav_balances_each_views_batch(kind):
    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        t = teacher_logits(step)
        q = torch.stack([swav_sinkhorn(t[:, g], TEACHER_TEMP) for g in range(TARGETS)], dim=1)
        return cross_entropy(CROSS, q, plain.logits(rows), 0.1)

    agree(build("swav", sinkhorn="batch"), CROSS, formula, kind=kind)


@pytest.mark.parametrize("kind", ["embedding", "dense"])
def test_swavs_queue_joins_in_once_it_is_full(kind):
    """Two steps of 7 fill a queue of 14; from the third on the 14 rows before the batch are balanced with it."""

    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        codes = []
        for g in range(TARGETS):
            batch = teacher_logits(step)[:, g]
            queue = [teacher_logits(s)[:, g] for s in (step - 2, step - 1)] if step >= 2 else []
            codes.append(swav_sinkhorn(torch.cat([*queue, batch]), TEACHER_TEMP)[-IMAGES:])
        return cross_entropy(CROSS, torch.stack(codes, dim=1), plain.logits(rows), 0.1)

    agree(build("swav", kind, queue=14), CROSS, formula, steps=4, kind=kind)


def test_swavs_prototypes_are_normalised_before_the_step():
    objective = build("swav", sinkhorn="batch")
    objective.prototypes.weight.data.mul_(3)
    loss = objective(features(0), target_of(0), CROSS)
    torch.testing.assert_close(objective.prototypes.weight.norm(dim=1), torch.ones(PROTOTYPES))
    plain = Plain(objective)
    t = teacher_logits(0)
    q = torch.stack([swav_sinkhorn(t[:, g], TEACHER_TEMP) for g in range(TARGETS)], dim=1)
    expected = cross_entropy(CROSS, q, plain.logits(features(0).double()), 0.1)
    found = torch.autograd.grad(loss, objective.prototypes.weight)[0]
    exact = torch.autograd.grad(expected, plain.matrix)[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


# ==== msn ====


def msn_sinkhorn(probabilities: Tensor) -> Tensor:
    """msn's distributed_sinkhorn, on one rank: (R, K) probabilities -> rows summing to one."""
    q = probabilities / probabilities.sum()
    num_rows, num_prototypes = q.shape
    for _ in range(3):
        q = q / q.sum(dim=0, keepdim=True) / num_prototypes
        q = q / q.sum(dim=1, keepdim=True) / num_rows
    return q * num_rows


@pytest.mark.parametrize("kind", ["embedding", "dense"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_msn(kind, weight):
    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        t = teacher_logits(step)
        p_t = torch.softmax(t / 0.1, dim=-1)
        sharp = p_t ** (1 / 0.25)
        q = msn_sinkhorn((sharp / sharp.sum(-1, keepdim=True)).flatten(0, 1)).view_as(t)
        s = plain.logits(rows)
        mean = torch.softmax(s / 0.1, dim=-1).mean((0, 1))
        return cross_entropy(CROSS, q, s, 0.1) + weight * (torch.tensor(PROTOTYPES).log() + (mean * mean.log()).sum())

    agree(build("msn", mean_entropy=weight, sinkhorn="batch", teacher_temp=0.025), CROSS, formula, kind=kind)


def test_sinkhorns_two_starts_are_not_the_same():
    """What the tests above would show if MSN's Sinkhorn were SwAV's."""
    t = torch.randn(6, PROTOTYPES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (swav_sinkhorn(t, 0.1) - msn_sinkhorn(torch.softmax(t / 0.1, dim=1))).abs().max() > 1e-3


# ==== moco, disco, embedding ====


def info_nce(weights: Tensor, z: Tensor, k: Tensor, queue: Tensor, temp: float) -> Tensor:
    """MoCo's algorithm 1, a pair of views at a time: cross-entropy of [q.k, q.queue] / T with label 0."""
    total = torch.zeros((), dtype=torch.float64)
    for v in range(weights.shape[0]):
        for g in range(weights.shape[1]):
            logits = torch.cat([(z[:, v] * k[:, g]).sum(-1, keepdim=True), z[:, v] @ queue.T], dim=1) / temp
            labels = torch.zeros(len(logits), dtype=torch.long)
            total = total + weights[v, g].double() * F.cross_entropy(logits, labels)
    return total


class OldestOut:
    """A queue written with lists: rows that were pushed earliest leave first, the random ones in their order."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = list(rows)

    def push(self, keys: Tensor) -> None:
        for key in keys.flatten(0, 1):
            self.rows = [*self.rows[1:], key]


@pytest.mark.parametrize("centre", [None, "calibration"])
def test_moco(centre):
    objective = build("moco", queue=QUEUE, centre_targets=centre)
    queue = OldestOut(objective.queue.rows.double())

    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        k = teacher_rows(step).double()
        k = F.normalize(k - MEAN.double(), dim=-1) if centre else k
        loss = info_nce(CROSS, plain.embed(rows), k, torch.stack(queue.rows), 0.2)
        queue.push(k)
        return loss

    agree(objective, CROSS, formula, steps=4)


@pytest.mark.parametrize("only", [None, True])
@pytest.mark.parametrize("weight", [None, 32.0])
def test_disco(only, weight):
    objective = build("disco", only_consistency=only, consistency_weight=weight, **({} if only else {"queue": QUEUE}))
    queue = None if only else OldestOut(objective.queue.rows.double())

    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        z, k = plain.embed(rows), teacher_rows(step).double()
        distance = sum(((z[:, g] - k[:, g]) ** 2).sum(-1).mean() for g in range(TARGETS))
        loss = (weight or 1.0) * distance
        if queue is None:
            return loss
        loss = loss + (info_nce(torch.tensor([[0.0, 0.5], [0.5, 0.0]]), z, k, torch.stack(queue.rows), 0.2))
        queue.push(k)
        return loss

    agree(objective, SAME, formula, steps=3, views=TARGETS)


def test_disco_of_one_view_contrasts_it_with_its_own_key():
    objective = build("disco", queue=QUEUE)
    queue, plain = objective.queue.rows.double(), Plain(objective)
    target = target_of(0).views(0, 1)
    loss = objective(features(0, views=1), target, torch.ones(1, 1))
    z, k = plain.embed(features(0, views=1).double()), target.embedding.double()
    expected = info_nce(torch.ones(1, 1), z, k, queue, 0.2) + ((z - k) ** 2).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("centre", [None, "calibration"])
def test_embedding(centre):
    def formula(plain: Plain, rows: Tensor, step: int) -> Tensor:
        k = teacher_rows(step).double()
        k = F.normalize(k - MEAN.double(), dim=-1) if centre else k
        z = plain.embed(rows)
        return sum(
            CROSS[v, g].double() * ((z[:, v] - k[:, g]) ** 2).sum(-1).mean()
            for v in range(VIEWS)
            for g in range(TARGETS)
        )  # type: ignore[return-value]

    agree(build("embedding", centre_targets=centre), CROSS, formula)


# ==== prototypes' gradients ====


@pytest.mark.parametrize(
    ("name", "settings"), [("dino", {}), ("dino", {"mean_entropy": 1.0}), ("msn", {"mean_entropy": 1.0})]
)
def test_prototypes_get_the_formulas_gradient_on_the_sphere(name, settings):
    objective = build(name, head="fresh", **settings)
    loss = objective(features(0), target_of(0), CROSS)
    found = torch.autograd.grad(loss, objective.prototypes.weight_v)[0].double()
    v = objective.prototypes.weight_v.detach().double().requires_grad_()
    plain = Plain(objective)
    plain.matrix = F.normalize(v, dim=1)
    s, q = plain.logits(features(0).double()), torch.softmax(teacher_logits(0) / TEACHER_TEMP, dim=-1)
    mean = torch.softmax(s / 0.1, dim=-1).mean((0, 1))
    weight = settings.get("mean_entropy", 0.0)
    expected = cross_entropy(CROSS, q, s, 0.1) + weight * (torch.tensor(PROTOTYPES).log() + (mean * mean.log()).sum())
    torch.testing.assert_close(found, torch.autograd.grad(expected, v)[0], rtol=1e-4, atol=1e-6)
