"""Training without a teacher: three steps of each published algorithm written plainly in float64, and the schedules."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from rob.common.errors import MisuseError
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.objectives import OBJECTIVES, CopySettings, ObjectiveConfig
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.students import StudentConfig
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.momentum import Momentum, MomentumTargets
from rob.student_train.targets.pairing import PairingConfig, plan_views
from rob.student_train.train_config import TrainConfig
from rob.student_train.trainer import Trainer

CPU = torch.device("cpu")
IMAGES, STEPS, STEPS_PER_EPOCH, EPOCHS, PROTOTYPES = 4, 3, 2, 4, 12
MOMENTUM = CopySettings(PROTOTYPES, 0.9, 1.0, 0.07, 0.04, warmup_teacher_temp_epochs=2)
PUBLISHED = {name: objective.published for name, objective in OBJECTIVES.items() if objective.published}


def branch_of(objective: ObjectiveConfig, settings: CopySettings) -> MomentumTargets:
    return MomentumTargets(get_recipe("dino"), settings, objective, RunContext(None, CPU, objective=objective))


def training(objective: ObjectiveConfig, momentum: CopySettings, drop_path: float = 0.0, **changes):
    """A trainer and its branch in float64, four epochs of two steps, before the first."""
    config = TrainConfig(
        *(Path("data"), Path("out"), StudentConfig("test_resnet", 32, True, drop_path), Momentum()),
        objective=replace(objective, hidden_dim=16),
        pairing=PairingConfig("cross", step_targets=2, num_local=2, fresh=False),
        optimiser=OptimiserConfig("sgd", lr=0.5, weight_decay=0.0, warmup_epochs=0),
        epochs=EPOCHS,
        clip_grad=0.0,
        loader=LoaderConfig(batch_size=256),
        **changes,
    )
    branch = branch_of(objective, momentum)
    trainer = Trainer(config, branch.space, STEPS_PER_EPOCH, CPU)
    trainer.model.double()
    for layer in trainer.model.objective.head.mlp:  # DINO's start of .02 makes all images one
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)
    branch.follow(trainer.model, STEPS_PER_EPOCH, EPOCHS)
    return trainer, branch


def crops_of(step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(IMAGES, 2, 3, side, side, generator=random, dtype=torch.float64) for side in (32, 16)]


class PlainNetwork:
    """A backbone and a head of which only the layers are the project's."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = nn.ModuleList([deepcopy(model.backbone), deepcopy(model.objective.head.mlp)])
        self.rows = [p.detach().clone().requires_grad_() for p in last_layer(model)]

    def embed(self, crops: list[Tensor]) -> Tensor:
        backbone, mlp = self.modules
        views = torch.cat([backbone(c.flatten(0, 1)).unflatten(0, (IMAGES, 2)) for c in crops], dim=1)
        return F.normalize(mlp(views.flatten(0, 1)), dim=1).unflatten(0, views.shape[:2])

    @property
    def prototypes(self) -> Tensor:
        return F.normalize(self.rows[0], dim=1)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.modules.parameters(), *self.rows]


def last_layer(model: nn.Module) -> list[Tensor]:
    prototypes = model.objective.prototypes
    return [] if prototypes is None else [next(prototypes.parameters())]


def weights_of(model: nn.Module) -> list[Tensor]:
    """In the order of PlainNetwork's."""
    return [*model.backbone.parameters(), *model.objective.head.parameters(), *last_layer(model)]


def follow_plainly(objective: ObjectiveConfig, momentum: CopySettings, algorithm, **settings) -> Trainer:
    """Steps of the trainer beside ``algorithm(student, slow, crops, epoch) -> loss`` and SGD; all is equal after each."""
    trainer, branch = training(objective, momentum, **settings)
    student, slow = PlainNetwork(trainer.model), PlainNetwork(trainer.model)
    velocity = [torch.zeros_like(p) for p in student.parameters]
    for step in range(STEPS):
        crops, epoch = crops_of(step), step // STEPS_PER_EPOCH
        plan = plan_views(PairingConfig("cross", 2, 2, fresh=False), branch.views, epoch)
        branch.before_step(step)
        target = branch.embed(crops[0])
        weights = (plan.pair_weights > 0).double()
        (loss, _), rate = trainer.step(step, crops, target, weights / weights.sum())  # 1/6 in float32 is off by 3e-8
        expected = algorithm(student, slow, crops, epoch)
        gradients = torch.autograd.grad(expected, student.parameters)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
        for found, exact in zip(weights_of(trainer.model), gradients, strict=True):
            torch.testing.assert_close(found.grad, exact, rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            for p, v, gradient in zip(student.parameters, velocity, gradients, strict=True):
                v.mul_(0.9).add_(gradient)
                p.sub_(rate * v)
        branch.after_step(step)
        if momentum.copy_momentum is not None:
            m = 1 - (1 - momentum.copy_momentum) * (math.cos(math.pi * step / (STEPS_PER_EPOCH * EPOCHS)) + 1) / 2
            m = m if momentum.momentum_end == 1 else momentum.copy_momentum
            with torch.no_grad():
                for p, k in zip(student.parameters, slow.parameters, strict=True):
                    k.copy_(m * k + (1 - m) * p)
            for found, exact in zip(weights_of(branch.copy), slow.parameters, strict=True):
                torch.testing.assert_close(found, exact.detach(), rtol=1e-8, atol=1e-10)
        for found, exact in zip(weights_of(trainer.model), student.parameters, strict=True):
            torch.testing.assert_close(found.detach(), exact.detach(), rtol=1e-8, atol=1e-10)
    return trainer


def over_pairs(q: Tensor, s: Tensor, temp: float) -> Tensor:
    """DINO's double loop: the mean over pairs of different views of the cross-entropy."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for g in range(q.shape[1]):
        for v in range(s.shape[1]):
            if v == g:
                continue  # the student and the teacher on the same view
            total = total - (q[:, g] * torch.log_softmax(s[:, v] / temp, dim=-1)).sum(-1).mean()
            pairs += 1
    return total / pairs


def test_dino():
    centre = torch.zeros(PROTOTYPES, dtype=torch.float64)

    def algorithm(student: PlainNetwork, slow: PlainNetwork, crops: list[Tensor], epoch: int) -> Tensor:
        nonlocal centre
        with torch.no_grad():
            t = slow.embed(crops[:1]) @ slow.prototypes.T
        q = torch.softmax((t - centre) / [0.04, 0.07][epoch], dim=-1)
        loss = over_pairs(q, student.embed(crops) @ student.prototypes.T, 0.1)
        centre = centre * 0.9 + t.mean((0, 1)) * 0.1
        return loss

    trainer = follow_plainly(ObjectiveConfig("dino", centre_targets="running", bottleneck=10), MOMENTUM, algorithm)
    torch.testing.assert_close(trainer.model.objective.centres[0].centre, centre, rtol=1e-8, atol=1e-10)


def test_moco():
    queue: list[Tensor] = []

    def algorithm(student: PlainNetwork, slow: PlainNetwork, crops: list[Tensor], epoch: int) -> Tensor:
        q = student.embed(crops)
        with torch.no_grad():
            k = slow.embed(crops[:1])
        total, pairs = torch.zeros((), dtype=torch.float64), 0
        for g in range(2):
            for v in range(4):
                if v != g:
                    positive = (q[:, v] * k[:, g]).sum(-1, keepdim=True)
                    logits = torch.cat([positive, q[:, v] @ torch.stack(queue).T], dim=1) / 0.2
                    total = total + F.cross_entropy(logits, torch.zeros(IMAGES, dtype=torch.long))
                    pairs += 1
        for row in k.flatten(0, 1):
            queue.pop(0)
            queue.append(row)
        return total / pairs

    objective, momentum = ObjectiveConfig("moco", queue=20), CopySettings(0, 0.9, 0.9)
    trainer, _ = training(objective, momentum)
    queue.extend(trainer.model.objective.queue.rows)
    trainer = follow_plainly(objective, momentum, algorithm)
    rows = trainer.model.objective.queue.rows
    torch.testing.assert_close(rows.sort(0).values, torch.stack(queue).sort(0).values, rtol=1e-8, atol=1e-10)


def sinkhorn(logits: Tensor, eps: float) -> Tensor:
    q = torch.exp(logits / eps).t()
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).t()


@pytest.mark.parametrize("queue_from", [0, 1])
def test_swav(queue_from):
    queues: list[list[Tensor]] = [[], []]

    def algorithm(student: PlainNetwork, slow: PlainNetwork, crops: list[Tensor], epoch: int) -> Tensor:
        with torch.no_grad():
            student.rows[0].copy_(F.normalize(student.rows[0], dim=1))
        z = student.embed(crops)
        s, codes = z @ student.rows[0].T, []
        for g in range(2):
            earlier = queues[g][-6:] if len(queues[g]) >= 6 else []
            rows = torch.stack([*earlier, *z[:, g].detach()])
            codes.append(sinkhorn(rows @ student.rows[0].detach().T, 0.05)[-IMAGES:])
            if epoch >= queue_from:
                queues[g] += list(z[:, g].detach())
        return over_pairs(torch.stack(codes, dim=1), s, 0.1)

    momentum = CopySettings(PROTOTYPES, None, teacher_temp=0.05, queue_from_epoch=queue_from)
    follow_plainly(ObjectiveConfig("swav", queue=6, bottleneck=10), momentum, algorithm)


def test_msn():
    def algorithm(student: PlainNetwork, slow: PlainNetwork, crops: list[Tensor], epoch: int) -> Tensor:
        with torch.no_grad():  # one set of prototypes, the student's
            p = torch.softmax(slow.embed(crops[:1]) @ student.prototypes.T / 0.1, dim=-1)
        sharp = p**4 / (p**4).sum(-1, keepdim=True)
        q = sinkhorn(sharp.log().flatten(0, 1), 1.0).view_as(sharp)
        s = student.embed(crops) @ student.prototypes.T
        mean = torch.softmax(s / 0.1, dim=-1).mean((0, 1))
        return over_pairs(q, s, 0.1) + math.log(PROTOTYPES) + (mean * mean.log()).sum()

    follow_plainly(
        ObjectiveConfig("msn", bottleneck=10),
        replace(MOMENTUM, teacher_temp=0.025, warmup_teacher_temp=0.025, own_prototypes=True),
        algorithm,
    )


# ==== schedules ====


def test_the_schedules_are_dinos():
    """main_dino.py: numpy's linspace by epoch, and a cosine over all steps."""
    branch = branch_of(ObjectiveConfig("dino"), PUBLISHED["dino"])
    branch.total_steps = 1000
    temps = [branch.teacher_temp(epoch) for epoch in range(60)]
    expected = [*torch.linspace(0.04, 0.07, 50, dtype=torch.float64).tolist(), *[0.07] * 10]
    assert temps == pytest.approx(expected)
    assert branch.momentum(0) == pytest.approx(0.996)
    assert branch.momentum(500) == pytest.approx(0.998)
    assert branch.momentum(1000) == pytest.approx(1.0)


def test_a_sharp_temperature_is_not_warmed_down():
    """A warm-up from .04 to .02 would leave a short run at .03."""
    branch = branch_of(ObjectiveConfig("dino", teacher_temp=0.02), PUBLISHED["dino"])
    assert {branch.teacher_temp(epoch) for epoch in range(60)} == {0.02}


def test_msns_copy_slows_down_in_a_line_that_the_run_does_not_finish():
    """msn_train.py: equal steps from .996 that would reach 1 after 1.25 runs."""
    branch = branch_of(ObjectiveConfig("msn"), PUBLISHED["msn"])
    branch.total_steps = 1000
    increment = (1.0 - 0.996) / (1000 * 1.25)
    found = [branch.momentum(step) for step in (0, 1, 500, 1000)]
    assert found == pytest.approx([0.996, 0.996 + increment, 0.9976, 0.9992], abs=1e-12)


def test_prototypes_stay_still_for_the_epochs_asked():
    trainer, branch = training(ObjectiveConfig("dino", bottleneck=10), MOMENTUM, freeze_prototypes=1)
    start = trainer.model.objective.prototypes.weight_v.detach().clone()
    for step in range(3):
        branch.before_step(step)
        plan = plan_views(PairingConfig("cross", 2, 2, fresh=False), branch.views, 0)
        trainer.step(step, crops_of(step), branch.embed(crops_of(step)[0]), plan.pair_weights.double())
        assert torch.equal(trainer.model.objective.prototypes.weight_v, start) == (step < STEPS_PER_EPOCH)

    # What stands still has no share in the gradient's norm, which clipping bounds.
    trainer, branch = training(ObjectiveConfig("dino", bottleneck=10), MOMENTUM, freeze_prototypes=1)
    health, _ = trainer.step(0, crops_of(0), branch.embed(crops_of(0)[0]), plan.pair_weights.double())
    moved = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    assert health[1].item() == pytest.approx(torch.cat(moved).norm().item())

    with pytest.raises(MisuseError, match="`freeze_prototypes`: `objective` moco has none"):
        training(ObjectiveConfig("moco"), MOMENTUM, freeze_prototypes=1)


def test_the_copy_drops_no_path():
    trainer, branch = training(ObjectiveConfig("dino", bottleneck=10), MOMENTUM, drop_path=0.3)
    drops, still = (
        [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
        for model in (trainer.model, branch.copy)
    )
    assert max(drops) > 0
    assert set(still) == {0.0}
