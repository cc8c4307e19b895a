"""The student in parts, its dropped patches, and its head: what reaches which layer, and that parts are the whole batch."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchDropoutWithIndices
from torch import Tensor, nn

from rob.common.errors import MisuseError
from rob.common.run import seed_step
from rob.student_train.kernels import EmbeddingTarget
from rob.student_train.objectives import ObjectiveConfig, build_objective
from rob.student_train.student_with_head import StudentWithHead
from rob.student_train.students import StudentConfig, build_student, describe_student, patch_dropouts
from rob.student_train.targets.space import TargetSpace
from support.objectives import OF_VIEWS

IMAGES, DIM, PROTOTYPES = 6, 8, 12
CASES = {"moco": {"queue": 20}, "disco": {"queue": 20}, "dino": {"centre_targets": "running"}, "swav": {"queue": 13}}
VIT = StudentConfig("test_vit", 32, small_images=True)


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


def built(student: StudentConfig, name: str = "dino", parts: int = 1, **settings) -> StudentWithHead:
    """In float64 and training mode; the same weights in every call."""
    torch.manual_seed(0)
    backbone = build_student(student)
    space = TargetSpace(DIM, PROTOTYPES, True, 0.07, prototypes=unit(PROTOTYPES, DIM, seed=1).float())
    config = ObjectiveConfig(name, hidden_dim=16, bottleneck=DIM, **CASES.get(name, {}), **settings)
    objective = build_objective(config, backbone.num_features, space)
    for layer in objective.head.mlp:  # DINO's start of .02 makes all images one
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)
    return StudentWithHead(backbone, objective, parts).double().train()


def crops_of(step: int, locals_: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    views = ((2, 32), (locals_, 16))
    return [torch.randn(IMAGES, n, 3, side, side, generator=random, dtype=torch.float64) for n, side in views if n]


def after_steps(model: StudentWithHead, name: str, own_targets: bool = False) -> dict[str, Tensor]:
    """Losses and gradients of three steps, and what has been gathered."""
    found = {}
    for step in range(3):
        seed_step(0, 0, step)
        crops = crops_of(step, 0 if name == "disco" else 2)
        target = EmbeddingTarget(unit(IMAGES, 2, DIM, seed=20 + step), unit(PROTOTYPES, DIM, seed=1))
        weights = torch.rand(2 if name == "disco" else 4, 2, generator=torch.Generator().manual_seed(7)).double()
        model.zero_grad()
        loss = model(crops, None if own_targets else target, torch.eye(2).double() / 2 if name == "disco" else weights)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        found |= {f"{name} {step}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: torch.as_tensor(value) for name, value in model.state_dict().items()}


# ==== parts ====


@pytest.mark.parametrize(
    ("name", "own", "parts"), [*((name, False, 2) for name in OF_VIEWS), ("swav", True, 6)], ids=str
)
def test_parts_of_a_batch_are_the_batch_for_every_objective(name, own, parts):
    """Losses, gradients, centres and queues over three steps, with BatchNorm in the head, of a student that has none."""
    whole, cut = (after_steps(built(VIT, name, n), name, own) for n in (1, parts))
    assert len(whole) == len(cut) > 30
    for part, expected in whole.items():
        close = (
            {"rtol": 1e-5, "atol": 1e-6} if "pos_embed" in part else {"rtol": 1e-9, "atol": 1e-10}
        )  # resized in float32
        torch.testing.assert_close(cut[part], expected, **close, msg=lambda text, p=part: f"{p}: {text}")


def test_batchnorm_sees_parts_and_counts_each_once():
    """Against the backbone called part by part, plainly, with all its activations kept."""
    student = StudentConfig("test_resnet", 32, small_images=True)
    cut, plain = built(student, parts=3), built(student)
    target, weights = EmbeddingTarget(unit(IMAGES, 2, DIM, seed=3)), torch.full((4, 2), 1 / 8).double()
    target = replace(target, prototypes=unit(PROTOTYPES, DIM, seed=1))
    loss = cut(crops_of(0), target, weights)
    loss.backward()
    features = []
    for crops in crops_of(0):
        rows = [plain.backbone(crops[first : first + 2].flatten(0, 1)) for first in (0, 2, 4)]
        features.append(torch.cat(rows).unflatten(0, (IMAGES, 2)))
    expected = plain.objective(torch.cat(features, dim=1), target, weights)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for (name, found), exact in zip(cut.named_parameters(), plain.parameters(), strict=True):
        if exact.grad is not None:
            torch.testing.assert_close(found.grad, exact.grad, rtol=1e-8, atol=1e-10, msg=name)
    statistics = [name for name in plain.state_dict() if "running_" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(cut.state_dict()[name], plain.state_dict()[name], rtol=1e-10, atol=0)
    assert all(m.momentum for m in cut.modules() if isinstance(m, nn.BatchNorm2d))


def test_one_part_at_a_time_is_in_memory():
    """Each part's backward pass has ended before another is run again."""
    model, events = built(VIT, parts=3), []

    def ran(_: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        events.append(f"run {len(given[0])}")
        if result.requires_grad:
            result.register_hook(lambda _: events.append("back"))

    model.backbone.patch_embed.register_forward_hook(ran)
    target = EmbeddingTarget(unit(IMAGES, 2, DIM, seed=3), unit(PROTOTYPES, DIM, seed=1))
    loss = model(crops_of(0), target, torch.full((4, 2), 1 / 8).double())
    assert events == ["run 4"] * 6  # two views of two images, three times for each crop size
    del events[:]
    loss.backward()
    assert [event.split()[0] for event in events] == ["run", "back"] * 6


def test_parts_in_bf16_drop_the_same_paths_when_they_are_run_again():
    """The saved random state and autocast: two runs of the same seed agree, and gradients are those of the loss."""
    model = built(replace(VIT, drop_path=0.3, patch_drop=0.3), parts=2).float()
    target = EmbeddingTarget(unit(IMAGES, 2, DIM, seed=3).float(), unit(PROTOTYPES, DIM, seed=1).float())
    gradients = []
    for recompute in (True, False):
        seed_step(0, 0, 5)
        model.zero_grad()
        model.recompute, model.objective.centres[0].centre = recompute, torch.zeros(PROTOTYPES)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model([crops.float() for crops in crops_of(0)], target, torch.full((4, 2), 1 / 8))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], rtol=1e-2, atol=1e-4, msg=name)


# ==== dropped patches ====


def tokens_of(model: StudentWithHead) -> tuple[list[int], list[Tensor]]:
    """Filled in as the model runs: how many tokens reach the blocks, and the tokens."""
    counts, tokens = [], []

    def note(_: nn.Module, given: tuple[Tensor]) -> None:
        counts.append(given[0].shape[1])
        tokens.append(given[0].detach())

    model.backbone.blocks[0].register_forward_pre_hook(note)
    return counts, tokens


@pytest.mark.parametrize(("rate", "left"), [(None, 64), (0.0, 64), (0.15, 54), (0.9, 6)])
def test_global_crops_lose_patches_and_keep_their_class_token(rate, left):
    model = built(replace(VIT, patch_drop=rate))
    counts, tokens = tokens_of(model)
    target = EmbeddingTarget(unit(IMAGES, 2, DIM, seed=3), unit(PROTOTYPES, DIM, seed=1))
    for _ in range(2):  # the second step finds things as the first left them
        model(crops_of(0), target, torch.full((4, 2), 1 / 8).double())
    assert counts == [1 + left, 1 + 16] * 2
    backbone = model.backbone
    assert torch.equal(tokens[0][:, 0], (backbone.cls_token + backbone.pos_embed[:, :1])[0].expand(2 * IMAGES, -1))
    whole = backbone._pos_embed(backbone.patch_embed(crops_of(0)[0].flatten(0, 1)))
    for image, kept in zip(
        whole, tokens[0], strict=True
    ):  # after the position embedding: each is one of the image's own
        assert all((image == token).all(1).any() for token in kept)


def test_registers_stay_and_rotary_positions_follow():
    student = StudentConfig("vit_small_patch16_dinov3", 64, patch_drop=0.5)
    backbone = build_student(student).train()
    (layer,) = patch_dropouts(backbone)
    assert isinstance(layer, PatchDropoutWithIndices)
    assert layer.num_prefix_tokens == 5
    model = StudentWithHead(backbone, built(VIT).objective)
    counts, _ = tokens_of(model)
    model.features(torch.randn(1, 2, 3, 64, 64), drop_patches=True)
    model.features(torch.randn(1, 2, 3, 64, 64))
    assert counts == [5 + 8, 5 + 16]


def test_neither_evaluation_nor_a_copys_target_loses_patches():
    config = replace(VIT, patch_drop=0.5)
    model = built(config)
    crops = crops_of(0)[0]
    copy = model.copy_for_targets()
    counts, _ = tokens_of(copy)
    copy.features(crops)
    assert counts == [65]
    model.eval()
    counts, _ = tokens_of(model)
    assert torch.equal(model.features(crops, drop_patches=True), built(VIT).eval().features(crops))
    assert counts == [65]
    assert describe_student(config) == describe_student(VIT)


def test_the_same_step_drops_the_same_patches():
    def features(step: int, rank: int = 0) -> Tensor:
        seed_step(3, rank, step)
        return model.features(crops_of(0)[0], drop_patches=True)

    model = built(replace(VIT, patch_drop=0.5))
    with torch.no_grad():
        assert torch.equal(features(4), features(4))
        assert not torch.allclose(features(4), features(5))
        assert not torch.allclose(features(4), features(4, rank=1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "convnext_atto"])
def test_patch_drop_of_a_network_without_patches_is_one_sentence(name):
    with pytest.raises(
        MisuseError, match=rf"`patch_drop` 0\.1: {name} has no patches to drop, as ViTs have: leave it out"
    ):
        build_student(StudentConfig(name, 64, patch_drop=0.1))


@pytest.mark.parametrize("rate", [-0.1, 0.91, float("nan")])
def test_patch_drop_out_of_its_range(rate):
    with pytest.raises(MisuseError, match="`patch_drop` is"):
        replace(VIT, patch_drop=rate)


# ==== the head, a crop size at a time ====


def head_by_hand(model: StudentWithHead, sizes: list[Tensor]) -> Tensor:
    """The features of each crop size through the head's layers by themselves, BatchNorm written out."""
    parts = []
    for features in sizes:
        rows = features.flatten(0, 1)
        for layer in model.objective.head.mlp:
            if isinstance(layer, nn.BatchNorm1d):
                centred = rows - rows.mean(0)
                rows = centred / (centred.square().mean(0) + layer.eps).sqrt() * layer.weight + layer.bias
            else:
                rows = layer(rows)
        parts.append((rows / rows.square().sum(1, keepdim=True).sqrt()).unflatten(0, features.shape[:2]))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("apart", [None, True])
def test_the_heads_batchnorm_sees_sizes_together_or_apart(apart, monkeypatch):
    model = built(VIT, "msn", norm_by_size=apart)
    embedded: list[Tensor] = []
    original: Callable = model.objective.embed
    monkeypatch.setattr(model.objective, "embed", lambda rows: embedded.append(original(rows)) or embedded[-1])
    target = EmbeddingTarget(unit(IMAGES, 2, DIM, seed=3), unit(PROTOTYPES, DIM, seed=1))
    model(crops_of(0), target, torch.full((4, 2), 1 / 8).double())
    sizes = [model.features(crops) for crops in crops_of(0)]
    expected = head_by_hand(model, sizes if apart else [torch.cat(sizes, dim=1)])
    torch.testing.assert_close(embedded[0], expected, rtol=1e-10, atol=1e-10)
    monkeypatch.undo()
    copy = model.copy_for_targets()  # of a model in the middle of its training
    torch.testing.assert_close(copy.objective.embed(sizes[0]), head_by_hand(model, sizes[:1]), rtol=1e-10, atol=1e-10)


def test_a_head_without_batchnorm_has_no_sizes_to_keep_apart():
    with pytest.raises(MisuseError, match="`norm_by_size` is for the head's BatchNorm, and this head has none"):
        built(VIT, "moco", norm_by_size=True)


def test_a_compiled_student_has_the_same_parameters_and_so_has_its_copy():
    """What is compiled is the call: nothing that a checkpoint holds, and nothing that a copy shares."""
    model = built(VIT)
    names, crops = [*model.state_dict()], crops_of(0)[0]
    expected = model.features(crops)
    model.compile_backbone()
    copy = model.copy_for_targets()
    assert [*model.state_dict()] == names
    for each in (model, copy):
        assert each.backbone._compiled_call_impl is not None
    assert copy.backbone._compiled_call_impl is not model.backbone._compiled_call_impl
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model.features(crops), expected)
