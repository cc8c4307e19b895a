"""What the repository ships."""

from pathlib import Path

import torch

from rob.teacher_cache.config import TeacherConfig
from rob.teacher_cache.teachers import load_teacher

ASSETS = Path(__file__).parents[1] / "assets"


def test_the_self_supervised_teacher_comes_with_its_prototypes():
    teacher = load_teacher(TeacherConfig("resnet10t", ASSETS / "teacher_cifar10.safetensors"))
    assert (teacher.view_size, teacher.dim, teacher.num_prototypes, teacher.teacher_temp) == (32, 128, 512, 0.01)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        embedding = teacher(torch.randn(4, 3, 32, 32, generator=generator))
    assert embedding.isfinite().all() and embedding.std(0).min() > 0, "images are told apart"
