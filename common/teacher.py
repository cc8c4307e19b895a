"""The frozen teacher as both stages see it, and the one way from a batch of views to its embeddings."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .run import autocast
from .views.batch import Batch
from .views.recipes import Recipe


class FrozenTeacher(Protocol):
    """What makes targets; ``teacher_cache.teachers.Teacher`` is one.

    ``mean`` and ``std`` (3,) normalise its images, ``dim`` is the embedding's width D. ``prototypes`` (K, D), the ``centre``
    (K,) of its own training and its ``teacher_temp`` are None where there are none; ``num_prototypes`` is K, or 0.
    """

    @property
    def name(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def view_size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def dim(self) -> int: ...
    @property
    def num_prototypes(self) -> int: ...
    @property
    def prototypes(self) -> Tensor | None: ...
    @property
    def centre(self) -> Tensor | None: ...
    @property
    def teacher_temp(self) -> float | None: ...
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) normalised by mean and std -> embeddings (N, D) float32, unit rows."""
        ...


def embedder(
    teacher: FrozenTeacher, recipe: Recipe, view_size: int, device: torch.device, precision: str
) -> Callable[[Batch], Tensor]:
    """The function from a batch, whose last view set has V views of ``view_size`` pixels a side, to their embeddings (B, V, D)
    float32 on ``device``, where ``teacher`` is already.
    """
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)
    blur_scale = view_size / recipe.global_crops[0].size

    @torch.inference_mode()
    def embed(batch: Batch) -> Tensor:
        images = batch.to(device).augment(-1, blur_scale, mean, std)
        with autocast(device, precision):
            return teacher(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])

    return embed
