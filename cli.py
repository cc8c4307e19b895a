"""The command line: parses, and calls one function a command. Stages are imported inside the commands, so that --help is
instant.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rob import cli_options as o
from rob.common.errors import FailureError, MisuseError, is_out_of_memory

app = typer.Typer(
    help="Tiny vision backbones without labels: run a teacher once, train many students from its cached targets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
console = Console(quiet=os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0", markup=False)
"""Under torchrun rank 0 speaks for all; errors are every rank's own. A name with [brackets] is shown as it is."""


def main() -> None:
    """Entry point: one sentence and exit code 2 for misuse, 1 for a failed run, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for the name of a file that no encoding fits
    try:
        app(prog_name="rob")
    except (MisuseError, FailureError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, MisuseError) else 1)
    except OSError as error:  # a disk, a permission, a network: what the system says is the sentence
        print(f"error: {error.filename or 'rob'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: lower --batch-size, the size of the views, or --prototypes", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


# ==== data ====


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images (flat, or one sub-folder a class), or fashion-mnist, cifar10, cifar100 ..."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.beton", help="The packed file; a manifest goes beside it.")],
    split: Annotated[str, typer.Option(help="Of a named data set: train or test.")] = "train",
    max_resolution: Annotated[
        int | None, typer.Option(min=1, help="Longest side in pixels; 2 to 2.5 times the crop size loses nothing.")
    ] = None,
    jpeg_quality: Annotated[
        int,
        typer.Option(
            min=1, max=100, help="For images that must be encoded anew; JPEG files that need no change are kept."
        ),
    ] = 95,
    raw: Annotated[
        bool, typer.Option("--raw", help="Store pixels: fastest to read, 3 bytes a pixel. Best up to about 64 px.")
    ] = False,
    workers: o.Workers = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave broken images out and list them, instead of stopping.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many images, spread evenly over the source.")
    ] = None,
    shuffle: Annotated[
        bool,
        typer.Option(
            "--shuffle/--keep-order",
            help="Rows in an order of their own, always the same. Keep the source's only if it is shuffled already: training "
            "shuffles inside windows of neighbouring rows, and batches of one class or day teach less.",
        ),
    ] = True,
) -> None:
    """Pack images into one .beton file."""
    from rob.common.images.pack import PackConfig
    from rob.common.images.pack import pack as run

    config = PackConfig(source, out, max_resolution, jpeg_quality, raw, workers, skip_bad, split, limit, shuffle)
    with bar("packing", "images") as update:
        manifest = run(config, update)
    for path in manifest.skipped:
        note(f"skipped {path}: broken")
    size = out.stat().st_size
    note(f"{out}: {manifest.num_images:,} images, {size / 1e6:,.1f} MB, {len(manifest.classes or ())} classes")


# ==== the two stages ====


@app.command("cache-teacher")
def cache_teacher(
    data: o.Data,
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="The target store to write, or to go on with.")],
    teacher: o.TeacherName,
    checkpoint: o.Checkpoint = None,
    recipe: o.RecipeName = "dino",
    views: Annotated[
        int,
        typer.Option(
            min=1,
            help="Views of every image; the student rotates through them. 2 to 10; each costs one teacher forward.",
        ),
    ] = 4,
    view_size: o.ViewSize = None,
    encoding: Annotated[
        str, typer.Option(help="embedding (exact logits later), topk (smallest for large K), dense (small K).")
    ] = "embedding",
    store_dtype: Annotated[str | None, typer.Option(help="Of embeddings: float32, float16 (default) or int8.")] = None,
    topk: Annotated[
        int | None, typer.Option(min=1, help="Prototypes kept a view with --encoding topk, 64 by default.")
    ] = None,
    prototypes: Annotated[
        int,
        typer.Option(
            min=0, help="Fit so many prototypes for a teacher without a head; at most a quarter of the views."
        ),
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images a batch, each with all its views. Lower it when memory runs out.")
    ] = 32,
    precision: o.Precision = "fp32",
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
    seed: o.Seed = 0,
    global_scale: o.GlobalScale = None,
    centre: o.Centre = None,
    colour: o.Colour = None,
    flip: o.Flip = None,
    grey: o.Grey = None,
    blur: o.Blur = None,
    solarise: o.Solarise = None,
) -> None:
    """Stage 1: run the teacher once and store its targets. Killed, it goes on from the last whole chunk."""
    from rob.common.store.encodings import Encoding
    from rob.common.views.loader import LoaderConfig
    from rob.common.views.recipes import RecipeOverrides, get_recipe
    from rob.teacher_cache.cache import CacheConfig, CachePlan, CacheProgress
    from rob.teacher_cache.cache import cache_teacher as run
    from rob.teacher_cache.teachers import TeacherConfig

    stored = Encoding(encoding, dtype=store_dtype or Encoding.dtype, k=topk or Encoding.k)
    if encoding != "topk":
        o.refuse({"--topk": topk}, f"is for --encoding topk, and this is {encoding}")
    if encoding != "embedding":
        o.refuse({"--store-dtype": store_dtype}, f"is for --encoding embedding, and this is {encoding}")
    overrides = RecipeOverrides(
        global_scale=global_scale, centre=centre, colour=colour, flip=flip, grey=grey, blur=blur, solarise=solarise
    )
    config = CacheConfig(
        data=data,
        out=out,
        teacher=TeacherConfig(teacher, checkpoint),
        recipe=get_recipe(recipe, overrides),
        views=views,
        seed=seed,
        encoding=stored,
        view_size=view_size,
        prototypes=prototypes,
        precision=precision,
        device=device,
        loader=LoaderConfig(loader, batch_size, workers),
    )
    say_which_loader(config.loader)

    def show(plan: CachePlan) -> None:
        table = Table(title="plan", title_justify="left", show_header=False)
        table.add_row("images x views", f"{plan.num_images:,} x {plan.views}")
        meanwhile = f", and {plan.temporary_bytes_per_view:,} until it is done" if plan.temporary_bytes_per_view else ""
        table.add_row("bytes a view", f"{plan.bytes_per_view:,}{meanwhile}")
        table.add_row("total", f"{plan.total_bytes / 1e6:,.1f} MB before compression")
        table.add_row("free disk", f"{plan.free_bytes / 1e9:,.1f} GB")
        if plan.rows_done:
            table.add_row("done before", f"{plan.rows_done:,} images")
        table.add_row("estimated time", f"{plan.seconds:,.0f} s at {plan.views_per_second:,.0f} views/s")
        console.print(table)

    try:
        with bar("caching", "images") as update:
            run(config, CacheProgress(plan=show, rows=update, note=note))
    except KeyboardInterrupt:
        note("stopped: run the same command again to go on from the last whole chunk")
        raise
    note(f"{out}: complete")


# ==== what the user sees ====


def note(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)  # a path is copied whole


def say_which_loader(config: Any) -> None:
    if config.backend == "auto" and config.geometry == "pillow":
        note("ffcv is not installed here: the slower torch loader is used")


@contextmanager
def bar(what: str, unit: str) -> Iterator[Any]:
    """A progress bar; yields ``update(done, total)``."""
    columns = (
        TextColumn(what),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True, disable=console.quiet) as progress:
        task = progress.add_task(what, total=None, rate="")
        first: list[tuple[int, float]] = []

        def update(done: int, total: int, text: str | None = None) -> None:
            now = progress.get_time()
            first.append((done, now)) if not first else None
            passed = now - first[0][1]
            rate = f"{(done - first[0][0]) / passed:,.0f} {unit}/s" if passed > 0.5 else ""
            progress.update(task, completed=done, total=total, rate=text or rate)

        try:
            yield update
        finally:
            if not first:  # what failed at once, or was done already, has no progress to show
                progress.update(task, visible=False)


from rob import cli_compare, cli_detect, cli_eval, cli_measure, cli_sweep, cli_train  # noqa: E402, F401  (they add commands)
