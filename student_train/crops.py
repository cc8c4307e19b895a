"""What the student sees of a batch."""

import torch
from torch import Tensor

from ..common.errors import MisuseError
from ..common.run import pixel_dtype
from ..common.views.batch import Batch, ViewSet
from ..common.views.recipes import Recipe
from .config import PairingConfig
from .students import vit_patch
from .targets.branch import TargetBranch
from .targets.pairing import ViewPlan
from .train_config import TrainConfig


def crop_sets(config: TrainConfig, recipe: Recipe, plan: ViewPlan) -> tuple[ViewSet, ...]:
    """The student's crops: the global ones at its image size, then the local ones.

    By default those are smaller in the recipe's proportion, to the nearest side that a transformer's patches fill.
    """
    size = config.student.image_size
    sets = (ViewSet(plan.globals, size),)
    if not plan.locals:
        return sets
    local = recipe.local_crop
    if local is None:
        raise MisuseError(f"the recipe {recipe.name} of the targets has no local crops: use `num_local` 0")
    if config.local_size is not None and config.local_size > size:
        raise MisuseError(
            f"`local_size` {config.local_size} is more than `image_size` {size}: local crops are the smaller ones"
        )
    patch = vit_patch(config.student)
    patches = max(1, round(size * local.size / recipe.global_crops[0].size / patch))
    return (*sets, ViewSet(plan.locals, config.local_size or patches * patch))


def views_like(config: TrainConfig, branch: TargetBranch) -> str | None:
    """The resize path of the stored targets' views, which the student sees again pixel by pixel; None: its views are its own."""
    assert isinstance(config.pairing, PairingConfig)
    return branch.geometry if config.pairing.pairing != "cross" else None


class Preparation:
    """Turns a batch's bytes into the student's normalised crops on the device."""

    def __init__(
        self,
        recipe: Recipe,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.recipe, self.device, self.dtype = recipe, device, pixel_dtype(device, precision)
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    def __call__(self, batch: Batch, sets: tuple[ViewSet, ...]) -> list[Tensor]:
        """One (B, n, 3, S, S) tensor a set, float32, or what a student of this ``precision`` turns it into on a GPU."""
        crops = []
        for number, views in enumerate(sets):
            kind = self.recipe.global_crops[0] if number == 0 else self.recipe.local_crop
            assert kind is not None
            crops.append(batch.augment(number, views.size / kind.size, self.mean, self.std, self.dtype))
        return crops
