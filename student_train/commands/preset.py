"""How ``--preset`` meets the other options of ``rob train-student``: as their defaults, so that any option that is given beats
it, and without what the run has no use for.
"""

from typing import Any

import typer
from rich.table import Table

from ...common.options import GroupedCommand, given
from ...common.screen import console, say_waiting

OF_THE_COPY = ("prototypes", "copy_momentum", "warmup_teacher_temp_epochs", "split_batchnorm", "step_targets", "fresh")
"""Options of a preset that are for ``--targets momentum`` alone."""
OF_ITS_OWN_VIEWS = ("recipe", "global_scale", "interpolation")
"""Those that a store of targets has settled already."""
OF_ITS_RECIPE = ("global_scale", "local_scale", "interpolation", "global_weight")
"""Those that say more of the preset's recipe, and nothing of another one."""


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of the eager option: the preset's values become the defaults of the options parsed after it."""
    if name is not None:
        say_waiting("rob train-student: loading the preset")  # torch comes with it
        from ..presets import get_preset

        context.default_map = {**(context.default_map or {}), **get_preset(name).options()}
    return name


class PresetCommand(GroupedCommand):
    """A command with ``--preset``: it prints the preset in force, and gets None for what of it the run does not read."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params["preset"] is not None:
            unused = unused_options(ctx)
            show_preset(ctx, unused)
            ctx.params.update(dict.fromkeys(unused))
        return super().invoke(ctx)


def unused_options(context: typer.Context) -> dict[str, str]:
    """The preset's options that neither these targets nor this objective nor these crops read, and why.

    What is typed is never among them: that is refused where it means nothing.
    """
    from ...common.views.recipes import RECIPES
    from ..objectives import OBJECTIVES
    from ..presets import get_preset

    values, typed = context.params, given(context)
    objective, targets, recipe = values["objective"], *values["targets"][:1], RECIPES.get(values["recipe"])
    reasons: dict[str, str] = {}
    usual_pairing = "cross"
    if objective in OBJECTIVES:
        usual_pairing = OBJECTIVES[objective].pairing
        reasons |= dict.fromkeys(_unread_by(objective), f"{objective} does not read it")
        if OBJECTIVES[objective].beside_teacher is None or values["only_consistency"]:
            reasons["with_copy"] = "nothing asks for its keys"
    preset = get_preset(values["preset"])
    if preset.momentum is not None and objective != preset.objective.name:
        reasons |= dict.fromkeys(("step_targets", "fresh"), f"they are {preset.objective.name}'s")
    if not values["clip_grad"]:
        reasons["clip_each"] = "there is no limit"
    if targets != "momentum" and preset.momentum is not None:
        reasons |= dict.fromkeys(OF_THE_COPY, "there is no copy")
    if targets not in ("momentum", "online"):
        reasons |= dict.fromkeys(OF_ITS_OWN_VIEWS, "the store has its own")
        recipe = None
    if "recipe" in typed and values["recipe"] != preset.recipe:
        reasons |= dict.fromkeys(OF_ITS_RECIPE, f"recipe {values['recipe']} has its own")
    warmup, epochs = preset.optimiser.warmup_epochs, values["epochs"]
    if warmup and epochs is not None and epochs <= warmup:
        reasons["warmup_epochs"] = "the run is no longer than that: a tenth of it"
    # a preset whose own pairing is same says what local crops it has
    same = (values["pairing"] or usual_pairing) == "same" != preset.pairing.pairing
    if same or values["num_local"] == 0 or (recipe and recipe.local_crop is None):
        reasons |= dict.fromkeys(("local_scale", "global_weight"), "there are no local crops")
        reasons |= {"num_local": "there are no local crops"} if values["num_local"] else {}
    return {name: reasons[name] for name in preset.options() if name in reasons.keys() - typed}


def _unread_by(objective: str) -> set[str]:
    from ..config import read_by_some
    from ..objectives import OBJECTIVES
    from ..objectives.prototypes import PrototypeObjective
    from ..targets.momentum import unread_options

    unread = read_by_some() - OBJECTIVES[objective].options
    if not issubclass(OBJECTIVES[objective], PrototypeObjective):
        unread |= {"prototypes", "freeze_prototypes"}
    if OBJECTIVES[objective].published is not None:
        unread |= unread_options(objective).keys()
    return set(unread)


def show_preset(context: typer.Context, unused: dict[str, str]) -> None:
    """Print the preset in force, with what the command line changed in it and what of it is ``unused``."""
    from ..optimiser import LR_BATCH_SIZE
    from ..presets import get_preset

    name, typed = context.params["preset"], given(context)
    preset = get_preset(name)
    table = Table(title=f"preset {name}: {preset.source}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column()
    for option, value in preset.options().items():
        remark = f"not used: {unused[option]}" if option in unused else ""
        if option in typed:
            remark = f"given: {_text(context.params[option])}"
        if option == "lr":
            lr, batch_size = context.params["lr"], context.params["batch_size"]
            remark = f"{remark} x {batch_size}/{LR_BATCH_SIZE} = {lr * batch_size / LR_BATCH_SIZE:g}".strip()
        table.add_row("--" + option.replace("_", "-"), _text(value), remark)
    console.print(table)


def _text(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case tuple() | list():
            return " ".join(map(_text, value))
        case float():
            return f"{value:g}"
        case _:
            return str(value)
