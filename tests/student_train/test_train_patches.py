"""Training with targets of patches: from the store as online, beside local crops, and without a teacher."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from rob.common.heads import ProjectionHead, Prototypes
from rob.common.store.encodings import Encoding
from rob.common.store.patches import PatchChoice
from rob.student_train.config import PairingChoice
from rob.student_train.objectives import ObjectiveConfig
from rob.student_train.plan import make_plan
from rob.student_train.students import StudentConfig
from rob.student_train.targets.cached import Cached
from rob.student_train.targets.momentum import Momentum
from rob.student_train.targets.pairing import PairingConfig
from rob.student_train.train import TrainProgress, train_student
from rob.teacher_cache.teachers import TeacherConfig
from support.tiny import tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, curve, log_of, online, refused

VIT = StudentConfig("test_vit", 32, small_images=True)
"""8 x 8 patches, as the teacher's."""


@pytest.fixture(scope="module")
def vit_teacher(tmp_path_factory) -> TeacherConfig:
    """A ViT of 8 x 8 patches with a head of 24 dimensions and 10 prototypes."""
    torch.manual_seed(3)
    arguments = {"img_size": 32, "patch_size": 4}
    backbone = timm.create_model("test_vit", num_classes=0, **arguments)
    head, prototypes = ProjectionHead(64, 32, 24), Prototypes(10, 24)
    torch.nn.init.normal_(head.mlp[-1].weight, std=0.5)
    parts = {"backbone": backbone, "head": head, "head.last_layer": prototypes}
    tensors = {f"teacher.{part}.{n}": t for part, module in parts.items() for n, t in module.state_dict().items()}
    path = tmp_path_factory.mktemp("teacher") / "vit.safetensors"
    save_file(tensors, path)
    return TeacherConfig("test_vit", path, arguments)


def cached_with(path, data, teacher, choice):
    encoding = Encoding("embedding", "float32")
    return tiny_store(path, data, teacher, encoding=encoding, loader=LOADER, patches=choice)


@pytest.fixture(scope="module")
def grid_store(data, vit_teacher, tmp_path_factory):
    return cached_with(tmp_path_factory.mktemp("a") / "grid.zarr", data, vit_teacher, PatchChoice("grid", patch_dim=0))


def test_patch_from_the_store_is_as_online(config, vit_teacher, grid_store, tmp_path):
    objective = ObjectiveConfig("patch", hidden_dim=32, patch_from_region=True)
    pairing = PairingConfig("same", step_targets=2, num_local=2)
    config = replace(config, objective=objective, pairing=pairing, epochs=1)
    train_student(replace(config, targets=Cached(grid_store.path), out=tmp_path / "cached"))
    train_student(replace(config, targets=online(vit_teacher, grid_store), out=tmp_path / "online"))
    losses, expected = (torch.tensor(curve(tmp_path / name))[:, 2] for name in ("cached", "online"))
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-6)  # int8 of the tokens
    alone = replace(config, objective=replace(objective, patch_weight=0.0, patch_from_region=None))
    train_student(replace(alone, targets=Cached(grid_store.path), out=tmp_path / "alone"))
    assert log_of(tmp_path / "alone")[0]["loss"] < losses[0] - 0.1


def test_ibot_from_the_store_is_as_online(config, data, vit_teacher, tmp_path):
    config = replace(config, student=VIT, pairing=PairingConfig("same", step_targets=2, num_local=1), epochs=1)
    config = replace(config, objective=ObjectiveConfig("ibot", hidden_dim=32, head_norm=False))
    stores = {
        "embedding": cached_with(tmp_path / "e.zarr", data, vit_teacher, PatchChoice("embedding")),
        "prototypes": cached_with(tmp_path / "p.zarr", data, vit_teacher, PatchChoice("prototypes", patch_topk=5)),
    }
    train_student(replace(config, targets=online(vit_teacher, stores["embedding"]), out=tmp_path / "online"))
    expected = torch.tensor(curve(tmp_path / "online"))[:, 2]
    for name, store in stores.items():
        train_student(replace(config, targets=Cached(store.path), out=tmp_path / name))
        losses = torch.tensor(curve(tmp_path / name))[:, 2]
        torch.testing.assert_close(losses, expected, rtol=5e-3, atol=1e-6)
    unread = replace(config, objective=ObjectiveConfig("dino"), targets=Cached(stores["prototypes"].path))
    warnings = make_plan(replace(unread, out=tmp_path / "unread")).warnings
    assert any("does not read the patches of" in warning and "ibot does" in warning for warning in warnings)
    class_token = replace(config, objective=replace(config.objective, patch_weight=0.0), out=tmp_path / "class")
    train_student(replace(class_token, targets=Cached(stores["prototypes"].path)))
    assert log_of(tmp_path / "class")[0]["loss"] < expected[0] - 0.5  # about log K less
    fresh = replace(config, pairing=PairingConfig("cross", step_targets=2), targets=Cached(stores["embedding"].path))
    refused(replace(fresh, out=tmp_path / "fresh"), "compares patches of the very view that the teacher saw")


def test_ibot_without_a_teacher_has_its_patches_and_goes_on(config, tmp_path):
    config = replace(
        config,
        student=VIT,
        targets=Momentum(prototypes=16),
        pairing=PairingConfig("cross", step_targets=2, num_local=1, fresh=False),
        objective=ObjectiveConfig("ibot", hidden_dim=32, bottleneck=16, head_norm=False),
        epochs=2,
    )
    train_student(config)
    class_token = replace(
        config, objective=replace(config.objective, patch_weight=0.0), out=tmp_path / "class", epochs=1
    )
    train_student(class_token)
    assert log_of(config.out)[0]["loss"] > log_of(class_token.out)[0]["loss"] + 0.5
    tensors = torch.load(config.out / "checkpoint.pt", weights_only=True)["state"]["model"]
    assert tensors["objective.patch_centre.centre"].abs().max() > 0
    assert tensors["objective.mask_token"].abs().max() > 0


def test_a_grid_of_patches_is_usually_for_patch_where_there_are_no_prototypes(config, data, grid_store, tmp_path):
    settings = {"loader": LOADER, "patches": PatchChoice("grid", patch_dim=0)}
    plain = tiny_store(tmp_path / "plain.zarr", data, tiny_teacher_checkpoint(tmp_path), **settings)
    config = replace(config, targets=Cached(plain.path), pairing=None, epochs=2)
    config = replace(config, student=replace(config.student, small_images=True))
    asked, left = replace(config, objective=ObjectiveConfig("patch")), replace(config, objective=None)
    train_student(replace(asked, out=tmp_path / "asked"))
    for instead in (
        {"student": replace(left.student, small_images=False)},  # a map of one position
        {"student": replace(left.student, small_images=None)},  # and so may the plan's
        {"student": replace(VIT, patch_drop=0.2)},
        {"pairing": PairingChoice("cross")},
        {"compile": "default"},
    ):
        assert make_plan(replace(left, **instead)).config.objective.name == "embedding", instead
    train_student(replace(left, out=tmp_path / "left"))
    assert curve(tmp_path / "left") == curve(tmp_path / "asked")
    assert make_plan(replace(left, targets=Cached(grid_store.path))).config.objective.name == "dino"

    # a run that was begun with another one, before this was the usual one, goes on with that
    def stop(line: dict, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(replace(config, objective=ObjectiveConfig("embedding")), TrainProgress(log=stop))
    train_student(left)
    assert json.loads((config.out / "config.json").read_text())["objective"]["name"] == "embedding"


def test_patches_that_cannot_be_learned_are_warned_of_or_refused(config, grid_store):
    small = replace(config, targets=Cached(grid_store.path), objective=ObjectiveConfig("patch"))
    assert "single position" not in " ".join(make_plan(small).warnings)
    whole = replace(small, student=replace(small.student, small_images=False))
    assert any("map is a single position, which says nothing" in warning for warning in make_plan(whole).warnings)
    pooled = replace(whole, objective=ObjectiveConfig("embedding"))
    assert "single position" not in " ".join(make_plan(pooled).warnings)
    dropped = replace(small, student=replace(VIT, patch_drop=0.2))
    refused(dropped, "leaves no whole map for the patches of `objective` patch")
    refused(
        replace(small, objective=ObjectiveConfig("patch", patch_layer=90)),
        "gives no map of features at `patch_layer` 90",
    )
