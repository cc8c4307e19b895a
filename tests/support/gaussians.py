"""A classification task whose right answers are far from certain: wrong rules show as wrong accuracies."""

import torch

from rob.student_train.evaluate.features import Features


def gaussian_classes(count: int, num_classes: int = 10, dim: int = 32, spread: float = 2.0, seed: int = 0) -> Features:
    """``count`` rows of overlapping Gaussian classes, labels in turn; the centres do not depend on ``seed``."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % num_classes
    return Features(centres[labels] + spread * torch.randn(count, dim, generator=generator), labels)
