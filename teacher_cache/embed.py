"""A batch of views to the teacher's embeddings, the same way whether they are cached, verified or made on the spot."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.augment import augment
from ..common.run import autocast
from ..common.views import Recipe
from .teachers import Teacher


def embedder(
    teacher: Teacher, recipe: Recipe, view_size: int, device: torch.device, precision: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (views (B, V, 3, S, S) uint8, colour (B, V, 8)) -> embeddings (B, V, D) float32 on ``device``.

    ``views`` and ``colour`` are a batch's as ViewLoader gives them, S = ``view_size``. ``teacher`` is on ``device`` already.
    """
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)
    blur_scale = view_size / recipe.global_crops[0].size

    @torch.inference_mode()
    def embed(views: Tensor, colour: Tensor) -> Tensor:
        images = augment(views.to(device).flatten(0, 1), colour.flatten(0, 1), blur_scale, mean, std)
        with autocast(device, precision):
            return teacher(images).float().unflatten(0, views.shape[:2])

    return embed
