"""How ``--preset`` meets the other options of a command: as their defaults, so that any option that is given beats it, and
without what the run has no use for.
"""

from typing import Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from rob.common.screen import console
from rob.student_train.presets import OF_ITS_OWN_VIEWS, OF_ITS_RECIPE, OF_THE_COPY, get_preset


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of the eager option: the preset's values become the defaults of the options parsed after it."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **get_preset(name).options}
    return name


class PresetCommand(TyperCommand):
    """A command with ``--preset``: it prints the preset in force, and gets None for what of it the run does not read."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params["preset"] is not None:
            unused = unused_options(ctx)
            show_preset(ctx, unused)
            ctx.params.update(dict.fromkeys(unused))
        return super().invoke(ctx)


def explicit(context: typer.Context) -> set[str]:
    """Names of the parameters that the command line gives."""
    names = context.params
    return {name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def unused_options(context: typer.Context) -> dict[str, str]:
    """The preset's options that neither these targets nor this objective nor these crops read, and why.

    What is typed is never among them: that is refused where it means nothing.
    """
    from rob.common.views.recipes import RECIPES
    from rob.student_train.objectives import OBJECTIVES
    from rob.student_train.pairing import usual_pairing

    values, given = context.params, explicit(context)
    objective, targets, recipe = values["objective"], values["targets"], RECIPES.get(values["recipe"])
    reasons: dict[str, str] = {}
    if objective in OBJECTIVES:
        reasons |= dict.fromkeys(_unread_by(objective), f"{objective} does not read it")
    if targets != "momentum":
        reasons |= dict.fromkeys(OF_THE_COPY, "there is no copy")
    if targets not in ("momentum", "online"):
        reasons |= dict.fromkeys(OF_ITS_OWN_VIEWS, "the store has its own")
        recipe = None
    preset = get_preset(values["preset"])
    if "recipe" in given and values["recipe"] != preset.options.get("recipe"):
        reasons |= dict.fromkeys(OF_ITS_RECIPE, f"recipe {values['recipe']} has its own")
    same = (values["pairing"] or usual_pairing(objective)) == "same"
    if same or values["num_local"] == 0 or (recipe and recipe.local_crop is None):
        reasons |= dict.fromkeys(("local_scale", "global_weight"), "there are no local crops")
        reasons |= {"num_local": "there are no local crops"} if values["num_local"] else {}
    return {name: reasons[name] for name in preset.options if name in reasons.keys() - given}


def _unread_by(objective: str) -> set[str]:
    from rob.student_train.momentum import PUBLISHED, unread_options
    from rob.student_train.objectives import OBJECTIVES, OPTIONS
    from rob.student_train.objectives.prototypes import PrototypeObjective

    unread = OPTIONS - OBJECTIVES[objective].options
    if not issubclass(OBJECTIVES[objective], PrototypeObjective):
        unread |= {"prototypes", "freeze_prototypes"}
    if objective in PUBLISHED:
        unread |= unread_options(objective).keys()
    return set(unread)


def show_preset(context: typer.Context, unused: dict[str, str]) -> None:
    """Print the preset in force, with what the command line changed in it and what of it is ``unused``."""
    from rob.student_train.optimiser import LR_BATCH_SIZE

    name, given = context.params["preset"], explicit(context)
    preset = get_preset(name)
    table = Table(title=f"preset {name}: {preset.source}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column()
    for option, value in preset.options.items():
        remark = f"not used: {unused[option]}" if option in unused else ""
        if option in given:
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
