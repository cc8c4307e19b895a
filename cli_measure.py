"""The commands that look and measure: teachers, inspect, verify, bench, demo."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rob import cli_options as o
from rob.cli import app, bar, console, note
from rob.cli_branches import drawn
from rob.common.errors import MisuseError


@app.command()
def teachers(
    name: Annotated[
        str | None, typer.Argument(help="One of them: everything about it, with where to download its file.")
    ] = None,
) -> None:
    """The published teachers that rob knows: head, prototypes, temperature, licence, and where the file is."""
    from rob.common.errors import unknown_name
    from rob.teacher_cache.registry import teacher_table

    rows = {row["name"]: row for row in teacher_table()}
    if name is not None and name not in rows:
        raise unknown_name("teacher", name, rows)
    if name is not None:
        for column, value in rows[name].items():
            note(f"{column:>12}  {value}")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns are enough
    columns = {"name": "name", "backbone": "backbone", "published": "head", "prototypes": "K", "temperature": "temp."}
    for column, title in columns.items():
        table.add_column(title, no_wrap=True, justify="right" if column in ("prototypes", "temperature") else "left")
    for (method, licence), group in groupby(rows.values(), lambda row: (row["method"], row["licence"])):
        table.add_row(method, f"licence: {licence}", style="bold")
        for row in group:
            table.add_row(*(row[column] for column in columns))
    console.print(table, highlight=False)
    note("rob teachers NAME says where its file is, what its head is made of, and how the file names its parts.")
    note("MLP: the projection head. K prototypes behind it, whose logits have the temperature in the method's targets.")
    note(
        "Without prototypes the targets are embeddings (of the backbone only, where there is no MLP), or prototypes fitted to "
        "them: rob cache-teacher --prototypes K. Any other timm model is such a teacher."
    )


@app.command("inspect")
def inspect_(
    path: Annotated[Path, typer.Argument(help="A .beton or a target store.")],
    sheet: Annotated[
        Path | None,
        typer.Option(
            help="Draw a contact sheet to this PNG: the first images with their views, and a store's nearest neighbours."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="With --sheet for a store: the .beton it was cached from.")] = None,
    recipe: o.RecipeName = "dino",
    images: Annotated[int, typer.Option(min=1, help="Images on the sheet, at most 64.")] = 6,
) -> None:
    """Show what a .beton or a target store holds."""
    from rob.common.look.contact_sheet import SheetConfig, contact_sheet
    from rob.common.look.contents import inspect
    from rob.common.views.recipes import get_recipe

    found = inspect(path)
    table = Table(title=found.title, title_justify="left", show_header=False)
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    if sheet is None:
        return
    is_store = path.is_dir()
    if is_store and data is None:
        raise MisuseError("--sheet of a store needs its images: pass --data DATA.beton")
    config = SheetConfig(
        data=data if is_store and data else path,
        out=sheet,
        store=path if is_store else None,
        recipe=get_recipe(recipe),
        images=images,
    )
    note(f"written to {contact_sheet(config)}")


@app.command()
def views(
    out: Annotated[Path, typer.Argument(metavar="PREVIEW.png", help="The picture to draw.")],
    data: Annotated[Path, typer.Option(help="Images packed by rob pack.")],
    recipe: o.RecipeName = "dino",
    num_global: Annotated[int | None, typer.Option(min=1, help="Global crops an image; default the recipe's.")] = None,
    num_local: Annotated[int | None, typer.Option(min=0, help="Local crops an image; default the recipe's.")] = None,
    global_scale: o.GlobalScale = None,
    local_scale: o.LocalScale = None,
    centre: o.Centre = None,
    colour: o.Colour = None,
    flip: o.Flip = None,
    grey: o.Grey = None,
    blur: o.Blur = None,
    solarise: o.Solarise = None,
    images: Annotated[int, typer.Option(min=1, help="Images to draw, spread over the data set; at most 64.")] = 5,
    seed: o.Seed = 0,
) -> None:
    """Draw what a recipe does: crop boxes, crops, and how much paired views differ in scale.

    Look for: crops that no longer show the object (raise the LOW of a scale), colours that matter and are gone (--colour 0), and
    medians far above recipe dino's, which small networks learn badly from.
    """
    from rob.common.look.contact_sheet import SheetConfig, contact_sheet
    from rob.common.views.recipes import RecipeOverrides

    overrides = RecipeOverrides(
        num_global, num_local, global_scale, local_scale, centre, colour, flip, grey, blur, solarise
    )
    config = SheetConfig(data, out, images=images, spread=True, recipe=drawn(recipe, overrides), seed=seed, ratios=True)
    note(f"written to {contact_sheet(config)}")


@app.command("verify")
def verify_(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A target store.")],
    data: o.Data,
    teacher: o.TeacherName,
    checkpoint: o.Checkpoint = None,
    samples: Annotated[int, typer.Option(min=1, help="Random views to compute again with the live teacher.")] = 256,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Distance a unit embedding may have moved; default by precision. On one machine 1e-4 will do."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass. Lower it when memory runs out.")] = 64,
    precision: Annotated[
        str | None,
        typer.Option(help="Default the store's. fp32 for one cached with fp16 on a GPU, where there is only a CPU."),
    ] = None,
    device: o.Device = "auto",
    workers: o.Workers = 0,
    seed: o.Seed = 0,
) -> None:
    """Check every chunk of a store, and a sample of its targets against the live teacher."""
    from rob.teacher_cache.teachers import TeacherConfig
    from rob.teacher_cache.verify import VerifyConfig, VerifyProgress, verify

    config = VerifyConfig(
        store,
        data,
        TeacherConfig(teacher, checkpoint),
        samples,
        seed,
        device,
        precision,
        tolerance,
        batch_size,
        workers,
    )
    with bar("chunks", "chunks") as chunks, bar("views", "views") as views:
        result = verify(config, VerifyProgress(chunks, views))
    note(
        f"{store}: every chunk is whole; {len(result.samples)} views agree, "
        f"mean cosine {result.mean_cosine:.6f}, lowest {result.lowest_cosine:.6f}"
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Its folder; results of an earlier demo there are replaced.")] = Path(
        "runs/demo"
    ),
    device: o.Device = "auto",
) -> None:
    """The whole idea on Fashion-MNIST, in minutes and without downloads on Debian."""
    from rob.benchmarks import demo as stage

    note(
        "The teacher here is EfficientNet-Lite0, a small supervised stand-in that needs no download. Online, a real one is\n"
        "  rob cache-teacher DATA.beton targets.zarr --teacher vit_small_patch16_224.dino"
    )
    summary = stage.run(stage.DemoConfig(out=out, device=device), stage.DemoScreen(note, bar))
    table = Table(title="k-NN top-1 on Fashion-MNIST", title_justify="left")
    table.add_column("features")
    table.add_column("top-1 %", justify="right")
    for name, top1 in summary["knn_top1"].items():
        table.add_row(name.replace("_", " "), f"{top1:.2f}")
    console.print(table)
    note("  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items()))
    note(f"written to {out}: summary.json, curve.png, student/student.safetensors")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="pipeline, branches, loader, store, cache, precision or loss.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON to write; default benchmarks/results/NAME_DEVICE_DATE.json.")
    ] = None,
    device: o.Device = "auto",
) -> None:
    """Measure one part against its peers and its floor, in one run."""
    from importlib import import_module

    from rob.common.errors import unknown_name

    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    module = import_module(f"rob.benchmarks.{name}")
    settings = getattr(module, BENCHMARKS[name])
    report = module.run(settings(device=device) if "device" in settings.__dataclass_fields__ else settings())
    report.show(console)
    note(f"written to {report.write(out)}")


BENCHMARKS = {
    "pipeline": "PipelineConfig",
    "branches": "BranchesConfig",
    "loader": "LoaderBenchConfig",
    "store": "StoreBenchConfig",
    "cache": "CacheBenchConfig",
    "precision": "PrecisionConfig",
    "loss": "LossConfig",
}
"""Modules of ``rob.benchmarks`` and the names of their configurations."""
