"""What fills the target branch of ``rob train-student``, from its options. Here the two stages meet."""

from pathlib import Path
from typing import TYPE_CHECKING

from rob.common.errors import MisuseError
from rob.common.screen import note

if TYPE_CHECKING:
    import torch

    from rob.common.views.recipes import Recipe, RecipeOverrides
    from rob.student_train.presets import Preset
    from rob.student_train.targets.cached import Cached
    from rob.student_train.targets.online import Online

OF_THE_TARGETS = ("global_scale", "centre", "colour", "flip", "grey", "blur", "solarise")
"""Fields of ``RecipeOverrides`` that change the views which a store's targets belong to."""


def drawn(recipe: str, overrides: "RecipeOverrides") -> "Recipe":
    """The recipe as asked. MisuseError: local crops are asked for that it does not have."""
    from rob.common.views.recipes import get_recipe

    found = get_recipe(recipe, overrides)
    if overrides.local_scale is not None and found.local_crop is None:
        raise MisuseError(
            f"--local-scale: recipe {recipe} has no local crops, take dino, sslight, swav, sslight-swav or msn"
        )
    return found


def preset_recipe(preset: "Preset") -> "Recipe":
    """How a preset draws views."""
    from rob.common.views.recipes import RecipeOverrides

    areas = {name: preset.options.get(name) for name in ("global_scale", "local_scale")}
    return drawn(preset.options["recipe"], RecipeOverrides(**areas))


def online(
    teacher: str | None,
    checkpoint: Path | None,
    view_size: int | None,
    views: int,
    recipe: "Recipe",
    device: "torch.device",
) -> "Online":
    """The frozen teacher, run in every step: the baseline without a cache."""
    from rob.student_train.targets.online import Online
    from rob.teacher_cache.teachers import TeacherConfig, load_teacher

    if teacher is None:
        raise MisuseError("--targets online needs --teacher NAME (rob teachers lists them)")
    return Online(load_teacher(TeacherConfig(teacher, checkpoint)).to(device), recipe, views, view_size)


def cached(
    path: Path, window_mib: float, in_memory: bool, overrides: "RecipeOverrides", preferred: "Recipe | None" = None
) -> "Cached":
    """Targets from a store, with the local crops of ``preferred``, a preset's recipe.

    MisuseError: something is asked of the views that the store's targets belong to.
    """
    from rob.student_train.targets.cached import Cached

    for field in OF_THE_TARGETS:
        if getattr(overrides, field) is not None:
            option = f"--{field.replace('_', '-')}"
            raise MisuseError(
                f"{option} is for --targets online or momentum; the store {path} has targets of its own views: leave {option} "
                f"out, or cache again with it (local crops have no targets: --num-local, --local-scale, --local-size are free)"
            )
    return Cached(path, window_mib, in_memory, preferred, overrides.local_scale)


def note_other_global_crops(path: Path, stored: "Recipe", preferred: "Recipe") -> None:
    """Where a preset has other global crops than the store's."""
    if preferred.global_crops != stored.global_crops:
        note(
            f"{path} was cached with {_areas(stored)} and the preset has {_areas(preferred)}: the store's global crops are "
            f"used, and the preset's local ones; rob cache-teacher with the preset's --recipe and --global-scale makes them"
        )


def _areas(recipe: "Recipe") -> str:
    low, high = recipe.global_crops[0].scale
    return f"recipe {recipe.name} (global crops of {low:g} to {high:g} of the image)"
