"""``rob sweep``: a grid of runs."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from typer.core import TyperGroup, TyperOption

from ...common.config import Device
from ...common.errors import MisuseError, unknown_name
from ...common.screen import bar, console, note
from ...common.settings import Setting

if TYPE_CHECKING:
    from ..sweep import Flag


def sweep(
    context: typer.Context,
    out: Annotated[Path, Setting("The folder for all runs, the table and the picture.", argument="OUT")],
    arguments: Annotated[
        list[str], Setting("What rob train-student gets in every run, after --.", argument="-- DATA.beton OPTIONS")
    ],
    vary: Annotated[
        list[str],
        Setting(
            "OPTION=VALUE,VALUE of train-student, once for every option: 'local-size=16,24', "
            "'local-scale=0.05 0.14,0.05 0.3', 'head-norm=yes,no'. Every combination is a run."
        ),
    ],
    test: Annotated[Path | None, Setting("Labelled images for k-NN; default a fifth of DATA.")] = None,
    device: Device = "auto",
) -> None:
    """Train over a grid of options: a table, a heat map.

    One run after another, or one on every GPU. Stopped, the same command goes on; more values may be added. A failed run is
    named with its log once the others are done.
    """
    from ...common.signals import stopped_by_signals
    from ..sweep import SweepConfig, Variation, draw_heat_map, sweep

    options = training_options(context)
    flags = training_flags(options)
    config = SweepConfig(out, tuple(arguments), tuple(Variation.parse(text, flags) for text in vary), test, device)
    check_names(options, [v.option for v in config.variations] + [word for word in arguments if word.startswith("--")])
    for cell in config.cells():
        check_words(context, [*config.arguments, *config.varied(cell), "--out", str(config.folder(cell))])
    try:
        with stopped_by_signals(), bar("sweeping", "runs") as update:
            rows = sweep(config, update)
    except (KeyboardInterrupt, SystemExit) as stopped:
        note("stopped: run the same command again to go on from there")
        stopped.args = stopped.args or ("told",)
        raise
    table = Table(title=f"{out}", title_justify="left")
    for variation in config.variations:
        table.add_column(variation.option)
    table.add_column("loss", justify="right")
    table.add_column("k-NN top-1 %", justify="right")
    best = max(row.knn_top1 for row in rows)
    for row in rows:
        style = "bold" if row.knn_top1 == best else None
        table.add_row(*row.values, f"{row.loss:.4f}", f"{row.knn_top1:.2f}", style=style)
    console.print(table)
    draw_heat_map(config, rows, out / "sweep.png")
    note(f"written to {out}: sweep.json, sweep.png, and a folder a run")


def training_options(context: typer.Context) -> list[TyperOption]:
    """Those of rob train-student."""
    application = context.find_root().command
    assert isinstance(application, TyperGroup)
    return options_of(application.commands["train-student"].params)


def check_words(context: typer.Context, words: list[str]) -> None:
    """MisuseError: rob train-student would not take these words, or does not know the student or the objective. No run is made
    of them."""
    from ..objectives import ObjectiveConfig  # which fills in the names of all
    from ..students import model_family

    application = context.find_root().command
    assert isinstance(application, TyperGroup)
    try:
        values = application.commands["train-student"].make_context("train-student", list(words)).params
    except Exception as error:
        # What the parser refuses: a class of typer's that has no public name.
        said = getattr(error, "format_message", None)
        if said is None:
            raise
        raise MisuseError(f"rob train-student {' '.join(words)}: {said()}") from None
    model_family(values["student"])
    if values["objective"] is not None:
        ObjectiveConfig(values["objective"])


def options_of(parameters: Iterable[object]) -> list[TyperOption]:
    """The options among a command's parameters."""
    return [parameter for parameter in parameters if isinstance(parameter, TyperOption)]


def check_names(options: Iterable[TyperOption], names: Iterable[str]) -> None:
    """MisuseError, with the nearest names: rob train-student has no such option."""
    known = {word.removeprefix("--") for option in options for word in (*option.opts, *option.secondary_opts)}
    for text in names:
        name = text.removeprefix("--").partition("=")[0]
        if name not in known:
            raise unknown_name("option of rob train-student", name, sorted(known))


def training_flags(options: Iterable[TyperOption]) -> "dict[str, Flag]":
    """Its flags, by either name: ``--head-norm/--no-head-norm`` are two, one the other's opposite."""
    from ..sweep import Flag

    flags: dict[str, Flag] = {}
    for option in options:
        if option.is_flag:
            yes, no = option.opts[0], next(iter(option.secondary_opts), None)
            flags[yes.removeprefix("--")] = Flag(yes, no)
            if no is not None:
                flags[no.removeprefix("--")] = Flag(no, yes)
    return flags
