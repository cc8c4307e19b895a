"""What the repository ships."""

from pathlib import Path

import pytest
import torch

from rob.benchmarks import demo
from rob.common.errors import MisuseError
from rob.teacher_cache.config import TeacherConfig
from rob.teacher_cache.teachers import Teacher, load_teacher

ASSETS = Path(__file__).parents[1] / "assets"


def test_the_demo_has_the_smaller_one():
    config, view_size = demo.TEACHERS["ours"]
    teacher = load_teacher(config)
    assert (teacher.view_size, teacher.dim) == (view_size, 128)
    assert tells_images_apart(teacher)
    with pytest.raises(MisuseError, match="unknown teacher 'efficientnet': did you mean efficientnet_lite0"):
        demo.DemoConfig(teacher="efficientnet")


def test_the_self_supervised_teacher_comes_with_its_prototypes():
    teacher = load_teacher(TeacherConfig("resnet10t", ASSETS / "teacher_cifar10.safetensors"))
    assert (teacher.view_size, teacher.dim, teacher.num_prototypes, teacher.teacher_temp) == (32, 128, 512, 0.01)
    assert tells_images_apart(teacher)


def tells_images_apart(teacher: Teacher) -> bool:
    side, generator = teacher.view_size, torch.Generator().manual_seed(0)
    with torch.inference_mode():
        embedding = teacher(torch.randn(4, 3, side, side, generator=generator))
    return bool(embedding.isfinite().all() and embedding.std(0).min() > 0)
