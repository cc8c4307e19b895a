"""MoCo's keys: BatchNorm's statistics are those of shuffled parts, and rows come back in their images' order."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rob.common.errors import MisuseError
from rob.common.ranks import Ranks
from rob.common.run import seed_step
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.optimiser import OptimiserConfig
from rob.student_train.student_with_head import StudentWithHead
from rob.student_train.students import StudentConfig, build_student
from rob.student_train.targets.branch import RunContext
from rob.student_train.targets.momentum import Momentum, MomentumTargets
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.targets.with_copy import WithCopy
from rob.student_train.train import train_student
from rob.student_train.train_config import TrainConfig
from support.rank_threads import World
from support.tiny import tiny_beton
from support.training import CPU, curve, refused

IMAGES, PARTS = 8, 4
MOCO = ObjectiveConfig("moco", hidden_dim=16, queue=20)
CNN = StudentConfig("test_resnet", 32, small_images=True)


def branch_of(parts: int | None, student: StudentConfig = CNN, accumulate: int = 1) -> MomentumTargets:
    """Beside its student, which is ``branch.model``, in float64."""
    torch.manual_seed(0)
    settings = Momentum(split_batchnorm=parts).settings("moco")
    branch = MomentumTargets(get_recipe("moco-v2"), settings, MOCO, RunContext(None, CPU, objective=MOCO))
    backbone = build_student(student)
    objective = build_objective(MOCO, backbone.num_features, branch.space)
    branch.follow(StudentWithHead(backbone, objective, accumulate).double().train(), 3, 4)
    return branch


def groups_of(backbone: nn.Module) -> list[Tensor]:
    """Filled in as it runs: the images of each forward pass, which BatchNorm sees together."""
    groups: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda _, given: groups.append(given[0].detach().clone()))
    return groups


def images(groups: list[Tensor], crops: Tensor) -> list[list[int]]:
    """By group: the numbers of the images whose two views are in it."""
    numbers = []
    for group in groups:
        pairs = group.unflatten(0, (-1, 2))
        numbers.append([next(n for n, image in enumerate(crops) if torch.equal(image, pair)) for pair in pairs])
    return numbers


def test_keys_are_normalised_in_shuffled_parts_and_come_back_in_order():
    branch, crops = branch_of(PARTS), torch.randn(IMAGES, 2, 3, 32, 32, dtype=torch.float64)
    of_keys, of_queries = groups_of(branch.copy.backbone), groups_of(branch.model.backbone)
    seed_step(0, 0, 5)
    keys = branch.embed(crops).embedding
    branch.model.features(crops)
    shuffled, in_order = images(of_keys, crops), images(of_queries, crops)
    assert in_order == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sorted(number for part in shuffled for number in part) == [*range(IMAGES)]
    assert not {frozenset(part) for part in shuffled} & {frozenset(part) for part in in_order}
    # Plainly: an image's key is made among the images of its own part, and stands where the image does.
    plain = branch_of(None).copy
    for part in shuffled:
        expected = plain.objective.embed(plain.backbone(crops[part].flatten(0, 1)).unflatten(0, (-1, 2)))
        torch.testing.assert_close(keys[part], expected, rtol=1e-10, atol=1e-12)
    for name, value in plain.backbone.state_dict().items():  # the running statistics, over the same parts in turn
        torch.testing.assert_close(branch.copy.backbone.state_dict()[name], value, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(keys, branch_of(None).embed(crops).embedding, rtol=1e-3)
    seed_step(0, 0, 5)
    assert torch.equal(branch.embed(crops).embedding, keys)
    seed_step(0, 0, 6)
    assert not torch.allclose(branch.embed(crops).embedding, keys, rtol=1e-3)


def test_ranks_exchange_the_images_of_their_keys(monkeypatch):
    """Two ranks have two of the four parts each, of images of both, in the order that rank 0 draws."""
    world, crops = World(monkeypatch, 2), torch.randn(IMAGES, 2, 3, 32, 32, dtype=torch.float64)
    orders = torch.tensor([3, 6, 1, 4, 7, 0, 2, 5]), torch.arange(IMAGES)
    monkeypatch.setattr(torch, "randperm", lambda number: orders[world.here.rank])
    started = [branch_of(None) for _ in range(2)]

    def keys_of(rank: int) -> tuple[Tensor, list[Tensor], int]:
        branch = started[rank]
        branch.settings = replace(branch.settings, split_batchnorm=PARTS)
        branch.follow(branch.model, 3, 4)
        groups = groups_of(branch.copy.backbone)
        return branch.embed(crops[4 * rank :][:4]).embedding, groups, branch.model.parts

    found = world.run(keys_of)
    assert [images(groups, crops) for _, groups, _ in found] == [[[3, 6], [1, 4]], [[7, 0], [2, 5]]]
    assert [parts for *_, parts in found] == [2, 2]
    keys, plain = torch.cat([keys for keys, *_ in found]), branch_of(None).copy
    for part in orders[0].view(PARTS, -1).tolist():
        expected = plain.objective.embed(plain.backbone(crops[part].flatten(0, 1)).unflatten(0, (-1, 2)))
        torch.testing.assert_close(keys[part], expected, rtol=1e-10, atol=1e-12)


def test_the_student_keeps_its_activations_unless_it_accumulates():
    assert (branch_of(4).model.parts, branch_of(4).model.recompute) == (4, False)
    assert (branch_of(4, accumulate=2).model.parts, branch_of(4, accumulate=2).model.recompute) == (4, True)


def test_what_cannot_be_split_is_refused(monkeypatch):
    with pytest.raises(MisuseError, match="`split_batchnorm`: `objective` dino shuffles no keys, leave it out"):
        Momentum(split_batchnorm=8).settings("dino")
    with pytest.raises(MisuseError, match="`split_batchnorm` is 0, expected at least 1"):
        Momentum(split_batchnorm=0)
    assert Momentum(split_batchnorm=1).settings("moco") == Momentum().settings("moco")  # a preset's 8 can be given up
    assert WithCopy(Momentum(), split_batchnorm=1).settings("disco").split_batchnorm is None
    with pytest.raises(MisuseError, match="`split_batchnorm` is for a student with BatchNorm, and this one has none"):
        branch_of(4, replace(CNN, name="test_vit"))
    with pytest.raises(MisuseError, match="`split_batchnorm` 2 makes larger parts than `accumulate` 4: use 4 or more"):
        branch_of(2, accumulate=4)
    monkeypatch.setattr("rob.student_train.targets.momentum.current_ranks", lambda: Ranks(0, 2))
    with pytest.raises(MisuseError, match="`split_batchnorm` 3 cannot be shared by 2 ranks: take a multiple, or 1"):
        branch_of(3)
    with pytest.raises(MisuseError, match="`split_batchnorm` 4 makes larger parts than `accumulate` 4: use 8 or more"):
        branch_of(4, accumulate=4)


def test_a_run_with_split_batchnorm_repeats_and_is_another(tmp_path):
    config = TrainConfig(
        *(tiny_beton(tmp_path, 24).path, tmp_path / "run", CNN, Momentum(split_batchnorm=2), MOCO),
        pairing=PairingConfig("cross", step_targets=2, fresh=False),
        optimiser=OptimiserConfig(warmup_epochs=0),
        epochs=2,
        device="cpu",
        loader=LoaderConfig("torch", batch_size=8, workers=1),
        log_every=1,
    )
    refused(replace(config, targets=Momentum(split_batchnorm=3)), "`split_batchnorm` 3 does not divide the 8 images")
    again, without = (replace(config, out=tmp_path / name) for name in ("again", "without"))
    for run in (config, again, replace(without, targets=Momentum())):
        train_student(run)
    assert curve(config.out) == curve(again.out) != curve(without.out)
