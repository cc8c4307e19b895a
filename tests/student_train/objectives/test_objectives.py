"""The objectives against their formulas written out by hand, and the targets that cannot serve them."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rob.common.errors import MisuseError
from rob.student_train.kernels import EmbeddingTarget, entropy, mean_entropy, reference
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.objectives.queue import Queue
from rob.student_train.targets.space import TargetSpace
from support.objectives import OF_VIEWS

IMAGES, VIEWS, TARGETS, FEATURES, DIM, PROTOTYPES = 6, 3, 2, 20, 8, 12
SMALL = {"hidden_dim": 16, "bottleneck": 10}


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


FEATURE_ROWS = unit(IMAGES, VIEWS, FEATURES, seed=0) * 4
TARGET_ROWS, TARGET_PROTOTYPES = unit(IMAGES, TARGETS, DIM, seed=1), unit(PROTOTYPES, DIM, seed=2)
WEIGHTS = torch.tensor([[0.0, 0.3], [0.2, 0.1], [0.4, 0.0]])
MEAN = 0.3 * unit(DIM, seed=3)
SPACE = TargetSpace(DIM, PROTOTYPES, True, 0.05, MEAN, TARGET_PROTOTYPES @ MEAN)


@pytest.fixture(autouse=True)
def same_heads():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", [name for name in OF_VIEWS if name != "disco"])
@pytest.mark.parametrize("head_norm", [False, True])
def test_a_batch_twice_as_large_is_the_same_loss_and_gradient(name, head_norm):
    def loss_and_gradient(times: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        objective = build_objective(ObjectiveConfig(name, head_norm=head_norm, **SMALL), FEATURES, SPACE)
        target = EmbeddingTarget(TARGET_ROWS.repeat(times, 1, 1), TARGET_PROTOTYPES)
        loss = objective(FEATURE_ROWS.repeat(times, 1, 1), target, WEIGHTS)
        return loss.detach(), torch.autograd.grad(loss, objective.head.mlp[0].weight)[0]

    torch.testing.assert_close(loss_and_gradient(1), loss_and_gradient(2), rtol=1e-4, atol=1e-6)


def test_the_teachers_temperature_can_be_overridden():
    target = EmbeddingTarget(TARGET_ROWS, TARGET_PROTOTYPES)

    def loss(**settings) -> float:
        torch.manual_seed(0)
        return build_objective(ObjectiveConfig("dino", **SMALL, **settings), FEATURES, SPACE)(
            FEATURE_ROWS, target, WEIGHTS
        ).item()

    assert loss(teacher_temp=0.05) == loss() != loss(teacher_temp=0.1)


def test_half_precision_keeps_the_cosine_in_single():
    """Near the end of training 2 - 2 cos is small: with bfloat16's 8 bits it would be noise."""
    objective = build_objective(ObjectiveConfig("embedding", **SMALL), FEATURES, SPACE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(FEATURE_ROWS, EmbeddingTarget(TARGET_ROWS, TARGET_PROTOTYPES), WEIGHTS)
        embedding = objective.head(FEATURE_ROWS.flatten(0, 1)).unflatten(0, (IMAGES, VIEWS))
    expected = (WEIGHTS * (2 - 2 * torch.einsum("bvd,bgd->vg", embedding, TARGET_ROWS) / IMAGES)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["embedding", "dino"])
def test_targets_and_teacher_are_not_trained(name):
    objective = build_objective(ObjectiveConfig(name, centre_targets="calibration", **SMALL), FEATURES, SPACE)
    target = EmbeddingTarget(TARGET_ROWS.clone().requires_grad_(), TARGET_PROTOTYPES.clone().requires_grad_())
    if name == "embedding":
        target = EmbeddingTarget(TARGET_ROWS, TARGET_PROTOTYPES)
    objective(FEATURE_ROWS, target, WEIGHTS).backward()
    assert target.embedding.grad is None
    assert target.prototypes.grad is None
    trained = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in trained} == {"head"} | ({"prototypes"} if name == "dino" else set())
    assert not {"centre", "mean_embedding"} & objective.state_dict().keys()  # of the data, not of the student


@pytest.mark.parametrize(
    ("config", "space", "message"),
    [
        (
            ObjectiveConfig("embedding"),
            TargetSpace(DIM, PROTOTYPES, has_embedding=False),
            "the store holds logits: cache with `encoding` embedding",
        ),
        (ObjectiveConfig("dino"), TargetSpace(DIM, 0, True), "the teacher has no head: .* --prototypes K"),
        (ObjectiveConfig("dino"), TargetSpace(DIM, PROTOTYPES, True), "pass `teacher_temp`"),
        (
            ObjectiveConfig("embedding", centre_targets="calibration"),
            replace(SPACE, mean_embedding=None),
            "`centre_targets` needs the teacher's mean embedding",
        ),
        (
            ObjectiveConfig("dino", centre_targets="calibration"),
            replace(SPACE, mean_logits=None),
            "calibration .* only a store knows",
        ),
        (
            ObjectiveConfig("swav", head="frozen", head_type="mlp"),
            replace(SPACE, prototypes=None),
            "`head` frozen needs a teacher with prototypes, and these targets have none",
        ),
        (
            ObjectiveConfig("swav", head="frozen", head_type="mlp", bottleneck=DIM + 1),
            replace(SPACE, prototypes=TARGET_PROTOTYPES),
            f"`bottleneck` {DIM + 1} does not fit `head` frozen: the teacher's prototypes have {DIM} dimensions",
        ),
        (
            ObjectiveConfig("swav", head_type="mlp", bottleneck=8),
            SPACE,
            "`bottleneck`: `head_type` mlp goes straight to",
        ),
        (
            ObjectiveConfig("dino", head_type="mlp", norm_last_layer=False),
            SPACE,
            "`norm_last_layer`: `head_type` mlp goes",
        ),
        (
            ObjectiveConfig("dino", sinkhorn_iterations=3),
            SPACE,
            "`sinkhorn_iterations` is for `sinkhorn` batch or queue",
        ),
        (
            ObjectiveConfig("swav", sinkhorn_iterations=0, queue=8),
            SPACE,
            "`sinkhorn_iterations` 0 is a softmax, which no",
        ),
    ],
)
def test_targets_that_cannot_serve_are_refused(config, space, message):
    with pytest.raises(MisuseError, match=message):
        build_objective(config, FEATURES, space)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dinno"}, "unknown objective 'dinno': did you mean dino"),
        (
            {"name": "dino", "centre_targets": "calibrated"},
            "unknown centre targets 'calibrated': did you mean calibration",
        ),
        ({"name": "dino", "sinkhorn": "batches"}, "unknown sinkhorn 'batches': did you mean batch"),
        ({"name": "dino", "head": "teachers"}, "unknown head 'teachers': did you mean teacher"),
        (
            {"name": "moco", "sinkhorn": "batch"},
            "`sinkhorn` means nothing to `objective` moco: it is for dino, ibot, msn, swav",
        ),
        ({"name": "embedding", "teacher_temp": 0.1}, "`teacher_temp` means nothing to `objective` embedding"),
        ({"name": "dino", "only_consistency": True}, "`only_consistency` .* it is for disco"),
        ({"name": "embedding", "queue": 5}, "`queue` .* it is for dino, moco, disco"),
        ({"name": "moco", "queue": 0}, "`queue` is 0, expected at least 1"),
        ({"name": "dino", "student_temp": -1.0}, "`student_temp` is -1.0, expected at least 0.001"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(MisuseError, match=message):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dino", "centre_targets": "running", "sinkhorn": "batch"}, "leave out `centre_targets` running"),
        ({"name": "swav", "sinkhorn": "batch", "queue": 10}, "`queue` is for `sinkhorn` queue, and it is batch"),
        ({"name": "dino", "centre_targets": "checkpoint"}, "teacher's file has to bring"),
        (
            {"name": "moco", "centre_targets": "running"},
            "running is a mean of logits, and `objective` moco compares embeddings",
        ),
        ({"name": "moco", "queue": 101}, "`queue` 101 is longer than the data set of 100 images.*at most 12"),
        ({"name": "dino", "head": "teacher"}, "`head` teacher needs a teacher with prototypes"),
    ],
)
def test_settings_that_the_targets_cannot_serve(settings, message):
    with pytest.raises(MisuseError, match=message):
        build_objective(ObjectiveConfig(**settings), FEATURES, SPACE, num_images=100)


# ==== heads ====


@pytest.mark.parametrize("name", ["dino", "ibot", "swav", "msn"])
@pytest.mark.parametrize("head", ["teacher", "frozen"])
def test_a_head_from_the_teacher_starts_at_its_prototypes(name, head):
    rows = 1.5 * TARGET_PROTOTYPES
    objective = build_objective(ObjectiveConfig(name, head=head, **SMALL), FEATURES, replace(SPACE, prototypes=rows))
    objective(FEATURE_ROWS, EmbeddingTarget(TARGET_ROWS, rows), WEIGHTS).backward()
    # The others' are unit rows, but for a teacher's that stay as they are.
    start = rows if name in ("dino", "ibot") or head == "frozen" else TARGET_PROTOTYPES
    torch.testing.assert_close(objective.prototypes.matrix().detach(), start)
    gradients = [parameter.grad for parameter in objective.prototypes.parameters()]
    assert all(gradient is None for gradient in gradients) == (head == "frozen")
    assert objective.head.out_dim == DIM
    assert objective.head.mlp[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["dino", "ibot", "swav", "msn"])
def test_the_usual_head_starts_at_the_teacher_where_that_is_measured(name):
    with_prototypes = replace(SPACE, prototypes=TARGET_PROTOTYPES)
    starts = [
        build_objective(ObjectiveConfig(name, **SMALL), FEATURES, space).prototypes.matrix().detach().numpy()
        for space in (with_prototypes, SPACE)
    ]
    teacher = TARGET_PROTOTYPES.numpy()
    matches = [start.shape == teacher.shape and np.allclose(start, teacher, atol=1e-6) for start in starts]
    assert matches == [name in ("dino", "ibot"), False]


def test_a_student_that_says_what_the_teacher_says_has_the_least_loss_with_its_head():
    """With the teacher's prototypes, embedding and temperature the cross-entropy is the targets' own entropy."""
    config = ObjectiveConfig("dino", head="frozen", student_temp=0.05, **SMALL)
    objective = build_objective(config, FEATURES, replace(SPACE, prototypes=TARGET_PROTOTYPES))
    objective.embed = lambda features: TARGET_ROWS
    loss = objective(FEATURE_ROWS, EmbeddingTarget(TARGET_ROWS, TARGET_PROTOTYPES), torch.eye(2) / 2)
    q = torch.softmax(TARGET_ROWS @ TARGET_PROTOTYPES.T / 0.05, dim=-1)
    torch.testing.assert_close(loss, torch.special.entr(q).sum(-1).mean())


# ==== with a teacher, and without ====


def test_with_a_teacher_as_rob_released_it_and_alone_as_the_method_is():
    found = {}
    for name, of_student in product(("dino", "ibot", "swav", "msn"), (False, True)):
        objective = build_objective(ObjectiveConfig(name, **SMALL), FEATURES, replace(SPACE, of_student=of_student))
        found[name, of_student] = (objective.sinkhorn, objective.mean_entropy)
    plain = {(name, False): ("none", 0.0) for name in ("dino", "ibot", "msn")} | {("swav", False): ("batch", 0.0)}
    own = {("dino", True): ("none", 0.0), ("ibot", True): ("none", 0.0)}
    assert found == plain | own | {("swav", True): ("queue", 0.0), ("msn", True): ("batch", 1.0)}
    asked = ObjectiveConfig("swav", queue=10, **SMALL)  # who gives its length asks for it
    assert build_objective(asked, FEATURES, SPACE, num_images=800).centres[0].queue is not None
    asked = ObjectiveConfig("msn", sinkhorn="none", mean_entropy=0.5, **SMALL)
    assert build_objective(asked, FEATURES, replace(SPACE, of_student=True)).mean_entropy == 0.5


# ==== queues ====


def test_a_default_queue_suits_the_data_set():
    for num_images, rows in ((None, 65536), (10_000_000, 65536), (50_000, 6250), (5, 1)):
        objective = build_objective(ObjectiveConfig("moco", **SMALL), FEATURES, SPACE, num_images=num_images)
        assert objective.queue.rows.shape == (rows, DIM)
    alone = replace(SPACE, of_student=True)
    swav = build_objective(ObjectiveConfig("swav", **SMALL), FEATURES, alone, target_views=3, num_images=50_000)
    assert [len(centre.queue.rows) for centre in swav.centres] == [3840] * 3


@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_queue_holds_the_newest_rows(length, pushes):
    queue, rows = Queue(length, 1), []
    start = queue.rows.flatten().tolist()
    for count in pushes:
        new = [float(len(rows) + i) for i in range(count)]
        queue.push(torch.tensor(new).unsqueeze(1))
        rows += new
        assert sorted(queue.rows.flatten().tolist()) == sorted((start + rows)[-length:])
        assert queue.full == (len(rows) >= length)


# ==== disco's consistency ====


def test_discos_consistency_does_not_grow_with_the_batch_unless_its_weight_does():
    def loss(times: int, weight: float) -> float:
        torch.manual_seed(0)
        config = ObjectiveConfig("disco", only_consistency=True, consistency_weight=weight, **SMALL)
        objective = build_objective(config, FEATURES, SPACE)
        target = EmbeddingTarget(TARGET_ROWS.repeat(times, 1, 1), TARGET_PROTOTYPES)
        return objective(FEATURE_ROWS[:, :2].repeat(times, 1, 1), target, torch.eye(2) / 2).item()

    assert loss(1, 1.0) == pytest.approx(loss(4, 1.0), rel=1e-5)
    assert loss(1, 24.0) == pytest.approx(24 * loss(4, 1.0), rel=1e-5)


@pytest.mark.parametrize("option", ["queue", "student_temp"])
def test_only_consistency_refuses_what_is_infonces(option):
    config = ObjectiveConfig("disco", only_consistency=True, **SMALL, **{option: 4})
    with pytest.raises(MisuseError, match=f"`{option}` is InfoNCE's"):
        build_objective(config, FEATURES, SPACE)


def test_only_consistency_keeps_no_queue():
    objective = build_objective(ObjectiveConfig("disco", only_consistency=True, **SMALL), FEATURES, SPACE)
    assert not [name for name in objective.state_dict() if "queue" in name]


# ==== the mean entropy ====


def test_the_mean_entropy_in_chunks_is_the_same(monkeypatch):
    rows, prototypes = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3, 8), (12, 8)))
    whole = reference.mean_entropy(rows, prototypes, 0.3)
    for chunk_rows in (1, 4, 15):
        monkeypatch.setattr(entropy, "CHUNK_BYTES", chunk_rows * 12 * 8)
        parts = mean_entropy(rows, prototypes, 0.3)
        torch.testing.assert_close(parts, whole)
        found, expected = (torch.autograd.grad(x, [rows, prototypes], retain_graph=True) for x in (parts, whole))
        torch.testing.assert_close(found, expected)
