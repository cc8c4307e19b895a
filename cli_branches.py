"""What fills the target branch of ``rob train-student``, from its options. Here the two stages meet."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rob.common.errors import MisuseError
from rob.common.screen import note

if TYPE_CHECKING:
    import torch

    from rob.common.images.beton import Beton
    from rob.common.views.recipes import Recipe, RecipeOverrides
    from rob.student_train.branches import CachedTargets, OnlineTeacher
    from rob.student_train.momentum import MomentumBranch, MomentumConfig
    from rob.student_train.objectives import ObjectiveConfig
    from rob.student_train.presets import Preset

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


def momentum_config(
    objective: "ObjectiveConfig",
    prototypes: int | None,
    copy_momentum: float | None,
    warmup_teacher_temp_epochs: int | None,
) -> "MomentumConfig":
    """The objective's published values with those that are given. MisuseError: it has no use for one of them."""
    from rob.student_train.momentum import published, unread_options

    usual = published(objective.name)
    given = {
        "prototypes": prototypes,
        "copy_momentum": copy_momentum,
        "warmup_teacher_temp_epochs": warmup_teacher_temp_epochs or None,
    }
    for option, reason in unread_options(objective.name).items():
        if given[option] is not None:
            raise MisuseError(f"--{option.replace('_', '-')}: --objective {objective.name} {reason}, leave it out")
    warmup = usual.warmup_teacher_temp_epochs if warmup_teacher_temp_epochs is None else warmup_teacher_temp_epochs
    return replace(
        usual if copy_momentum is None else usual.with_momentum(copy_momentum),
        num_prototypes=prototypes or usual.num_prototypes,
        warmup_teacher_temp_epochs=warmup,
    )


def momentum_branch(
    objective: "ObjectiveConfig",
    config: "MomentumConfig",
    recipe: str,
    overrides: "RecipeOverrides",
    seed: int,
    device: "torch.device",
    precision: str,
) -> "MomentumBranch":
    """No teacher."""
    from rob.student_train.momentum import MomentumBranch

    return MomentumBranch(objective, drawn(recipe, overrides), seed, device, config, precision)


def online_branch(
    teacher: str | None,
    checkpoint: Path | None,
    view_size: int | None,
    views: int,
    recipe: str,
    overrides: "RecipeOverrides",
    precision: str,
    device: "torch.device",
    seed: int,
) -> "OnlineTeacher":
    """The frozen teacher, run in every step: the baseline without a cache."""
    from rob.student_train.branches import OnlineTeacher
    from rob.teacher_cache.teachers import TeacherConfig, load_teacher

    if teacher is None:
        raise MisuseError("--targets online needs --teacher NAME (rob teachers lists them)")
    views_as_drawn = drawn(recipe, overrides)
    model = load_teacher(TeacherConfig(teacher, checkpoint)).to(device)
    return OnlineTeacher(model, views_as_drawn, seed, views, view_size or model.view_size, device, precision)


def cached_branch(
    path: Path,
    data: "Beton",
    device: "torch.device",
    window_mib: float,
    in_memory: bool,
    overrides: "RecipeOverrides",
    preferred: "Recipe | None" = None,
) -> "CachedTargets":
    """Targets from a store. No target shows a local crop, so these may be other than the store's recipe has them:
    ``preferred``, of a preset, has its local crops and the weight of its global pairs used, and is told apart from the store's.

    MisuseError: something is asked of the views that the store's targets belong to.
    """
    from rob.student_train.branches import CachedTargets

    for field in OF_THE_TARGETS:
        if getattr(overrides, field) is not None:
            option = f"--{field.replace('_', '-')}"
            raise MisuseError(
                f"{option} is for --targets online or momentum; the store {path} has targets of its own views: leave {option} "
                f"out, or cache again with it (local crops have no targets: --num-local, --local-scale, --local-size are free)"
            )
    branch = CachedTargets(path, data, device, window_mib, in_memory)
    stored = branch.recipe
    local, global_weight = stored.local_crop, stored.global_weight
    if preferred is not None:
        if preferred.local_crop is not None:
            local, global_weight = preferred.local_crop, preferred.global_weight
        if preferred.global_crops != stored.global_crops:
            note(
                f"{path} was cached with {_areas(stored)} and the preset has {_areas(preferred)}: the store's global crops are "
                f"used, and the preset's local ones; rob cache-teacher with the preset's --recipe and --global-scale makes them"
            )
    if overrides.local_scale is not None:
        if local is None:
            raise MisuseError(
                f"--local-scale: the recipe {stored.name} of the store {path} has no local crops: leave it out, or cache with "
                "dino, sslight, swav, sslight-swav or msn"
            )
        local = replace(local, scale=tuple(overrides.local_scale), centre=0.0)
    branch.recipe = replace(stored, local_crop=local, global_weight=global_weight)
    return branch


def _areas(recipe: "Recipe") -> str:
    low, high = recipe.global_crops[0].scale
    return f"recipe {recipe.name} (global crops of {low:g} to {high:g} of the image)"
