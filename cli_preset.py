"""How ``--preset`` meets the other options of a command: as their defaults, so that any option that is given beats it."""

from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich.table import Table

from rob.cli import console
from rob.student_train.presets import get_preset


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of the eager option: the preset's values become the defaults of the options parsed after it."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **get_preset(name).options}
    return name


def explicit(context: typer.Context) -> set[str]:
    """Names of the parameters that the command line gives."""
    names = context.params
    return {name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def given(context: typer.Context, names: Sequence[str]) -> Iterable[Any]:
    """The values of these parameters from the command line, None for one that is not there: what a preset says is left out."""
    typed = explicit(context)
    return [context.params[name] if name in typed else None for name in names]


def show_preset(context: typer.Context) -> None:
    """Print the preset in force, with what the command line changed in it."""
    from rob.student_train.optimiser import LR_BATCH_SIZE

    name, typed = context.params["preset"], explicit(context)
    preset = get_preset(name)
    table = Table(title=f"preset {name}: {preset.source}", title_justify="left", show_header=False)
    for option, value in preset.options.items():
        changed = "" if option not in typed else f"given: {_text(context.params[option])}"
        if option == "lr":
            lr, batch_size = context.params["lr"], context.params["batch_size"]
            changed = f"{changed} x {batch_size}/{LR_BATCH_SIZE} = {lr * batch_size / LR_BATCH_SIZE:g}".strip()
        table.add_row("--" + option.replace("_", "-"), _text(value), changed)
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
