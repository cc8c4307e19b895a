"""The command for grids of runs: rob sweep."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rob import cli_options as o
from rob.cli import app, bar, console, note
from rob.common.errors import unknown_name

if TYPE_CHECKING:
    from rob.student_train.sweep import Flag


@app.command()
def sweep(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for all runs, the table and the picture.")],
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="-- DATA.beton OPTIONS", help="What rob train-student gets in every run, after --."),
    ],
    vary: Annotated[
        list[str],
        typer.Option(
            help="OPTION=VALUE,VALUE of train-student, once for every option: 'local-size=16,24', "
            "'local-scale=0.05 0.14,0.05 0.3', 'head-norm=yes,no'. Every combination is a run."
        ),
    ],
    test: Annotated[Path | None, typer.Option(help="Labelled images for k-NN; default a fifth of DATA.")] = None,
    device: o.Device = "auto",
) -> None:
    """Train over a grid of options, measure k-NN, and draw a table and a heat map.

    One run after another, or one on every GPU. Stopped, the same command goes on; more values may be added. A failed run is
    named with its log once the others are done.
    """
    from rob.common.signals import stopped_by_signals
    from rob.student_train.sweep import SweepConfig, Variation, draw_heat_map
    from rob.student_train.sweep import sweep as run

    flags = training_flags()
    config = SweepConfig(out, tuple(arguments), tuple(Variation.parse(text, flags) for text in vary), test, device)
    check_names([v.option for v in config.variations] + [word for word in arguments if word.startswith("--")])
    try:
        with stopped_by_signals(), bar("sweeping", "runs") as update:
            rows = run(config, update)
    except (KeyboardInterrupt, SystemExit):
        note("stopped: run the same command again to go on from there")
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


def training_parameters() -> list[Any]:
    """Click's parameters of rob train-student."""
    return typer.main.get_group(app).commands["train-student"].params


def check_names(options: Iterable[str]) -> None:
    """MisuseError, with the nearest names: rob train-student has no such option."""
    known = {
        word.removeprefix("--")
        for parameter in training_parameters()
        for word in (*parameter.opts, *parameter.secondary_opts)
    }
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        if name not in known:
            raise unknown_name("option of rob train-student", name, sorted(known))


def training_flags() -> "dict[str, Flag]":
    """The flags of rob train-student, by either name: ``--head-norm/--no-head-norm`` are two, one the other's opposite."""
    from rob.student_train.sweep import Flag

    flags: dict[str, Flag] = {}
    for parameter in training_parameters():
        if getattr(parameter, "is_flag", False):
            yes, no = parameter.opts[0], next(iter(parameter.secondary_opts), None)
            flags[yes.removeprefix("--")] = Flag(yes, no)
            if no is not None:
                flags[no.removeprefix("--")] = Flag(no, yes)
    return flags
