"""What the student sees: its crops, and their sizes."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from rob.common.views.recipes import get_recipe
from rob.student_train.crops import crop_sets
from rob.student_train.students import StudentConfig
from rob.student_train.targets.pairing import PairingConfig, plan_views
from rob.student_train.train import train_student
from rob.student_train.trainer import Trainer


def test_local_crops_take_steps_with_dino(config, monkeypatch):
    sizes: list[list[tuple[int, ...]]] = []
    original = Trainer.step

    def step(self: Trainer, at: int, crops: list[Tensor], *rest: Any) -> tuple[Tensor, float]:
        sizes.append([tuple(crop.shape) for crop in crops])
        return original(self, at, crops, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    pairing = PairingConfig("cross", step_targets=2, num_local=2, global_weight=0.4)
    vit = StudentConfig("test_vit", 32, small_images=True)
    objective = replace(config.objective, name="dino")
    train_student(replace(config, student=vit, objective=objective, pairing=pairing, epochs=1))
    assert sizes == [[(8, 2, 3, 32, 32), (8, 2, 3, 12, 12)]] * 3


@pytest.mark.parametrize(
    ("student", "recipe", "given", "side"),
    [
        (StudentConfig("vit_tiny_patch16_224", 224), "dino", None, 96),
        (StudentConfig("vit_tiny_patch16_224", 224), "sslight", None, 128),
        (StudentConfig("vit_tiny_patch16_224", 96), "dino", None, 48),
        (StudentConfig("vit_small_patch14_dinov2", 224), "dino", None, 98),
        (StudentConfig("vit_tiny_r_s16_p8_224", 224), "dino", None, 96),
        (StudentConfig("vit_tiny_patch16_224", 32, True), "dino", None, 12),
        (StudentConfig("resnet18", 32, True), "sslight", None, 20),
        (StudentConfig("resnet18", 8, True), "dino", None, 4),
        (StudentConfig("resnet18", 32, True), "dino", 17, 17),
    ],
)
def test_local_crops_are_in_the_recipes_proportion_in_whole_patches(config, student, recipe, given, side):
    plan = plan_views(PairingConfig("cross", 2, num_local=3), cached_views=2, epoch=0)
    global_set, local_set = crop_sets(replace(config, student=student, local_size=given), get_recipe(recipe), plan)
    assert (global_set.size, local_set.size) == (student.image_size, side)
    assert (len(global_set.ids), len(local_set.ids)) == (2, 3)
