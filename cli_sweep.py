"""The command for grids of runs: rob sweep."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rob import cli_options as o
from rob.cli import app, bar, console, note


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
            "'local-scale=0.05 0.14,0.05 0.3'. Every combination is a run."
        ),
    ],
    test: Annotated[Path | None, typer.Option(help="Labelled images for k-NN; default a fifth of DATA.")] = None,
    device: o.Device = "auto",
) -> None:
    """Train over a grid of options, measure k-NN, and draw a table and a heat map.

    One run after another, or one on every GPU. Stopped, the same command goes on; more values may be added. A failed run is
    named with its log once the others are done.
    """
    from rob.student_train.sweep import SweepConfig, Variation, draw_heat_map
    from rob.student_train.sweep import sweep as run

    config = SweepConfig(out, tuple(arguments), tuple(Variation.parse(text) for text in vary), test, device)
    with bar("sweeping", "runs") as update:
        rows = run(config, update)
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
