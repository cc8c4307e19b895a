"""A batch of views to the teacher's embeddings, the same way whether they are cached, verified or made on the spot."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.run import autocast
from ..common.views.loader import Batch
from ..common.views.recipes import Recipe
from .teachers import Teacher


def embedder(
    teacher: Teacher, recipe: Recipe, view_size: int, device: torch.device, precision: str
) -> Callable[[Batch], Tensor]:
    """The function from a batch of one set of V views, ``view_size`` pixels a side, to embeddings (B, V, D) float32 on
    ``device``, where ``teacher`` is already.
    """
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)
    blur_scale = view_size / recipe.global_crops[0].size

    @torch.inference_mode()
    def embed(batch: Batch) -> Tensor:
        images = batch.to(device).augment(0, blur_scale, mean, std)
        with autocast(device, precision):
            return teacher(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])

    return embed
