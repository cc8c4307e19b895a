"""DisCo with a copy, SEED, SimReg and KoLeo against their papers, a number at a time in float64: losses and gradients."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rob.common.errors import MisuseError
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.objectives.koleo import koleo
from rob.student_train.targets.joined import PairTarget
from rob.student_train.targets.space import TargetSpace

IMAGES, VIEWS, LOCALS, FEATURES, DIM, PROTOTYPES, QUEUE = 5, 2, 8, 12, 6, 9, 14
SAME = torch.eye(VIEWS, dtype=torch.float64) / VIEWS
RELEASED = torch.cat([torch.eye(VIEWS), torch.ones(LOCALS, VIEWS)]).double() / (VIEWS + LOCALS * VIEWS)
"""RoB's pairs: a global crop meets its own view, a local one every view."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(draw(*shape, seed=seed), dim=-1)


TEACHER_PROTOTYPES = unit(PROTOTYPES, DIM, seed=1)
SPACE = TargetSpace(DIM, PROTOTYPES, True, 0.07, mean_embedding=0.3 * unit(DIM, seed=3))


def teacher_rows(step: int) -> Tensor:
    return unit(IMAGES, VIEWS, DIM, seed=20 + step)


def copy_rows(step: int) -> Tensor:
    return unit(IMAGES, VIEWS, DIM, seed=30 + step)


def build(name: str, space: TargetSpace = SPACE, num_global: int | None = None, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = ObjectiveConfig(name, hidden_dim=16, **settings)
    objective = build_objective(config, FEATURES, space, VIEWS, num_global=num_global).double()
    for layer in objective.head.mlp:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5)
    return objective


def length(rows) -> float:
    return sum(x * x for x in rows) ** 0.5


def dot(one: Tensor, other: Tensor) -> Tensor:
    return sum(a * b for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


class OldestOut:
    """A queue written with a list: what was pushed earliest leaves first."""

    def __init__(self, objective: nn.Module) -> None:
        self.rows = list(objective.queue.rows.clone())

    def push(self, keys: Tensor) -> None:
        for key in keys.flatten(0, 1):
            self.rows = [*self.rows[1:], key]


def agree(objective: nn.Module, formula, target_of, weights: Tensor, steps: int = 4) -> None:
    """Loss and gradients (by features, by the first and last layers) in each step are those of ``formula(z, x, step)``."""
    layers = [layer.weight for layer in objective.head.mlp if isinstance(layer, nn.Linear)]
    for step in range(steps):
        rows = (4 * draw(IMAGES, len(weights), FEATURES, seed=10 + step)).requires_grad_()
        embed = deepcopy(objective.head)
        loss = objective(rows, target_of(step), weights)
        exact_rows = rows.detach().clone().requires_grad_()
        z = F.normalize(embed.mlp(exact_rows.flatten(0, 1)), dim=-1).unflatten(0, rows.shape[:2])
        expected = formula(z, exact_rows, step)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad(loss, [rows, layers[0], layers[-1]])
        own = [layer.weight for layer in embed.mlp if isinstance(layer, nn.Linear)]
        exact = torch.autograd.grad(expected, [exact_rows, own[0], own[-1]])
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


# ==== disco, with a copy of the student beside the teacher ====


def distances(z: Tensor, step: int) -> Tensor:
    """|z_s - z_t|^2 of every view with its own target, summed over dimensions and views, averaged over images."""
    teacher = teacher_rows(step)
    parts = [((z[b, g, d] - teacher[b, g, d]) ** 2) for b in range(IMAGES) for g in range(VIEWS) for d in range(DIM)]
    return sum(parts) / IMAGES  # type: ignore[return-value]


def of_both(step: int) -> PairTarget:
    return PairTarget(EmbeddingTarget(teacher_rows(step)), EmbeddingTarget(copy_rows(step)))


@pytest.mark.parametrize("weight", [None, 32.0])
def test_disco_with_a_copy_asks_with_the_first_view_and_answers_with_the_copys_second(weight):
    objective = build("disco", replace(SPACE, has_copy=True), queue=QUEUE, consistency_weight=weight)
    queue = OldestOut(objective)

    def formula(z: Tensor, x: Tensor, step: int) -> Tensor:
        loss = (weight or 1.0) * distances(z, step)
        for b in range(IMAGES):
            logits = [dot(z[b, 0], copy_rows(step)[b, 1]) / 0.2, *(dot(z[b, 0], row) / 0.2 for row in queue.rows)]
            loss = loss - (logits[0] - torch.stack(logits).exp().sum().log()) / IMAGES
        queue.push(copy_rows(step)[:, 1:])
        return loss

    agree(objective, formula, of_both, SAME)


def test_discos_lone_view_is_query_and_key():
    objective = build("disco", replace(SPACE, has_copy=True), queue=QUEUE)
    rows, queue = draw(IMAGES, 1, FEATURES, seed=5), objective.queue.rows.clone()
    target = PairTarget(EmbeddingTarget(teacher_rows(0)[:, :1]), EmbeddingTarget(copy_rows(0)[:, :1]))
    loss = objective(rows, target, torch.ones(1, 1, dtype=torch.float64))
    z, expected = objective.embed(rows)[:, 0], 0.0
    for b in range(IMAGES):
        logits = [dot(z[b], copy_rows(0)[b, 0]) / 0.2, *(dot(z[b], row) / 0.2 for row in queue)]
        expected = expected - (logits[0] - torch.stack(logits).exp().sum().log()) / IMAGES
        expected = expected + length(z[b] - teacher_rows(0)[b, 0]) ** 2 / IMAGES
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


# ==== seed ====


def seed_by_hand(z: Tensor, keys: Tensor, queue: list[Tensor], weights: Tensor, tau_s: float, tau_t: float) -> Tensor:
    """Algorithm 1 of the paper, a pair of views of an image at a time."""
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(len(z)):
        for v, g in weights.nonzero().tolist():
            instances = [keys[b, g], *queue]
            teacher = torch.stack([dot(keys[b, g], row) / tau_t for row in instances])
            student = torch.stack([dot(z[b, v], row) / tau_s for row in instances])
            q = (teacher - teacher.max()).exp()
            log_p = student - student.exp().sum().log()
            loss = loss - weights[v, g] * dot(q / q.sum(), log_p) / len(z)
    return loss


@pytest.mark.parametrize("weights", [SAME, RELEASED], ids=["same", "with locals"])
@pytest.mark.parametrize(
    ("settings", "temps"), [({}, (0.2, 1e-4)), ({"student_temp": 0.1, "teacher_temp": 0.05}, (0.1, 0.05))]
)
def test_seed(settings, temps, weights):
    objective = build("seed", queue=QUEUE, **settings)
    queue = OldestOut(objective)

    def formula(z: Tensor, x: Tensor, step: int) -> Tensor:
        keys = teacher_rows(step)
        loss = seed_by_hand(z, keys, queue.rows, weights, *temps)
        queue.push(keys)
        return loss

    agree(objective, formula, lambda step: EmbeddingTarget(teacher_rows(step)), weights)


def test_seed_at_its_published_temperature_is_infonce_on_the_images_own_key():
    found = build("seed", queue=QUEUE)(draw(IMAGES, 2, FEATURES, seed=7), EmbeddingTarget(teacher_rows(0)), SAME)
    other = build("moco", queue=QUEUE)(draw(IMAGES, 2, FEATURES, seed=7), EmbeddingTarget(teacher_rows(0)), SAME)
    torch.testing.assert_close(found, other, rtol=1e-10, atol=0)


def test_seed_takes_twins_in_the_queue_for_the_image_itself():
    """Half the target each, whatever the store's rounding made of the length of a row."""
    objective = build("seed", queue=1)
    keys = teacher_rows(0)[:1, :1]
    objective.queue.rows = keys[0].clone()
    rows = draw(1, 1, FEATURES, seed=7)
    loss = objective(rows, EmbeddingTarget(1.001 * keys), torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(loss.item(), math.log(2), rtol=1e-10, atol=0)


def test_seeds_similarities_are_exact_whatever_else_may_be_multiplied_as_tf32():
    """A GPU's TF32 is wrong in the fourth decimal, which is the temperature; the student's may be."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default and args[1].shape == (DIM, QUEUE):
                found.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    found: list[str] = []
    objective = build("seed", queue=QUEUE)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Products(), torch.no_grad():
            objective(draw(IMAGES, VIEWS, FEATURES, seed=7), EmbeddingTarget(teacher_rows(0)), SAME)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(usual)
    assert found == ["highest", "high"]


def test_a_queue_of_seed_is_as_long_as_mocos():
    for name in ("moco", "seed"):
        objective = build_objective(ObjectiveConfig(name, hidden_dim=16), FEATURES, SPACE, VIEWS, num_images=800)
        assert objective.queue.rows.shape == (100, DIM)
        with pytest.raises(MisuseError, match="`queue` 801 is longer than the data set of 800 images"):
            build_objective(ObjectiveConfig(name, hidden_dim=16, queue=801), FEATURES, SPACE, VIEWS, num_images=800)


# ==== simreg ====


@pytest.mark.parametrize("norm", [None, False])
def test_simreg_is_the_distance_behind_four_layers(norm):
    objective = build("simreg", head_norm=norm)
    first, second, third, last = (layer for layer in objective.head.mlp if isinstance(layer, nn.Linear))
    assert [(layer.in_features, layer.out_features) for layer in (first, second, third, last)] == [
        (FEATURES, 16), (16, FEATURES), (FEATURES, 16), (16, DIM),
    ]  # fmt: skip
    nothing_between = list(objective.head.mlp).index(second) + 1 == list(objective.head.mlp).index(third)
    assert nothing_between

    def hidden(rows: Tensor) -> Tensor:
        if norm is None:
            spread = ((rows - rows.mean(0)) ** 2).mean(0)
            rows = (rows - rows.mean(0)) / (spread + 1e-5).sqrt()
        return rows * (rows > 0)

    def formula(z: Tensor, x: Tensor, step: int) -> Tensor:
        rows = x.flatten(0, 1) @ first.weight.T + first.bias
        rows = hidden(rows) @ second.weight.T + second.bias
        rows = hidden(rows @ third.weight.T + third.bias) @ last.weight.T + last.bias
        by_hand = torch.stack([row / length(row) for row in rows]).unflatten(0, x.shape[:2])
        torch.testing.assert_close(by_hand, z, rtol=1e-10, atol=1e-10)
        return distances(z, step) / VIEWS  # the pairs weigh one together

    agree(objective, formula, lambda step: EmbeddingTarget(teacher_rows(step)), SAME, steps=2)


# ==== koleo ====


def koleo_by_hand(x: Tensor) -> Tensor:
    """DINOv2's ``koleo_loss.py``, a pair of images at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for v in range(x.shape[1]):
        rows = [row / length(row) for row in x[:, v]]
        for b, row in enumerate(rows):
            distance = [length(row - other + 1e-8) for n, other in enumerate(rows) if n != b]
            total = total - (min(distance) + 1e-8).log() / len(rows)
    return total


@pytest.mark.parametrize(("sinkhorn", "num_global"), [("none", VIEWS + 1), ("batch", None)])
@pytest.mark.parametrize("name", ["dino", "ibot", "swav", "msn"])
def test_koleo_joins_the_loss_of_prototypes_on_the_global_crops_features(name, sinkhorn, num_global):
    """On all of them, of which there may be more than targets."""
    crops = num_global or VIEWS
    target = EmbeddingTarget(teacher_rows(0), TEACHER_PROTOTYPES)
    rows = [draw(IMAGES, VIEWS + LOCALS, FEATURES, seed=8).requires_grad_() for _ in range(3)]
    plain, with_koleo = (build(name, SPACE, num_global, sinkhorn=sinkhorn, koleo=k) for k in (None, 0.1))
    loss, more = plain(rows[0], target, RELEASED), with_koleo(rows[1], target, RELEASED)
    exact = koleo_by_hand(rows[2][:, :crops])
    torch.testing.assert_close(more, loss + 0.1 * exact, rtol=1e-10, atol=1e-10)
    (usual, found, part) = (torch.autograd.grad(what, x)[0] for what, x in zip((loss, more, exact), rows, strict=True))
    torch.testing.assert_close(found, usual + 0.1 * part, rtol=1e-10, atol=1e-10)
    assert part[:, crops:].abs().sum() == 0


@given(st.integers(2, 9), st.integers(1, 3), st.integers(2, 6), st.integers(0, 1000))
def test_koleo_is_the_same_in_any_order_and_at_any_length(images, views, dim, seed):
    x = draw(images, views, dim, seed=seed)
    loss = koleo(x)
    torch.testing.assert_close(loss, koleo_by_hand(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(koleo(3 * x.flip(0)), loss, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(koleo(x.float()), loss.float(), rtol=1e-2, atol=1e-2)


def test_koleo_of_twins_is_large_and_finite():
    x = torch.ones(4, 1, 3, requires_grad=True)
    loss = koleo(x)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8 * (1 + 3**0.5)), rel=1e-5)
    assert x.grad.isfinite().all()


# ==== what cannot be ====


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "moco", "koleo": 0.1}, "`koleo` means nothing to `objective` moco: it is for dino, ibot, msn, swav"),
        ({"name": "dino", "koleo": -0.1}, "`koleo` is -0.1, expected at least 0"),
        ({"name": "simreg", "queue": 8}, "`queue` means nothing to `objective` simreg"),
        ({"name": "seed", "sinkhorn": "batch"}, "`sinkhorn` means nothing to `objective` seed"),
        ({"name": "seed", "teacher_temp": 1e-5}, "`teacher_temp` is 1e-05, expected at least 0.0001"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(MisuseError, match=message):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize("name", ["seed", "simreg"])
def test_logits_do_not_serve_what_compares_embeddings(name):
    with pytest.raises(
        MisuseError, match=f"`objective` {name} needs the teacher's embedding, but the store holds logits"
    ):
        build(name, replace(SPACE, has_embedding=False))
