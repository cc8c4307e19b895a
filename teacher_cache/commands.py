"""The commands of stage 1: cache-teacher, teachers, verify."""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.table import Table

from ..common.config import RecipeName
from ..common.errors import unknown_name
from ..common.options import given, refuse
from ..common.places import is_address, place_of, shown
from ..common.screen import bar, console, facts, note, note_slow_loader, say, say_waiting
from ..common.settings import Setting
from ..common.store.patches import NONE, PatchChoice
from ..common.views.recipes import USUAL_RECIPE, RecipeOverrides, get_recipe
from .config import CacheConfig, VerifyConfig

OF_GLOBAL_CROPS = {"num_global": None, "num_local": None, "local_scale": None}
"""No target shows a local crop, and ``views`` says how many global ones there are."""

ViewsOfPreset = Callable[[str], tuple[str, RecipeOverrides, int]]
"""Recipe, what is changed of it, and number of views: the other stage's, which ``cli.py`` hands in."""


def cache_teacher(
    context: typer.Context,
    *,
    config: partial[CacheConfig],
    recipe: RecipeName = USUAL_RECIPE,
    preset: Annotated[
        str | None,
        Setting(
            "The recipe, its scales and --views as rob train-student --preset wants them: rob-dino, rob-swav, sslight-cnn ... "
            "What else is given beats it.",
            group="Views",
        ),
    ] = None,
    overrides: Annotated[RecipeOverrides, OF_GLOBAL_CROPS],
    views_of_preset: ViewsOfPreset,
) -> None:
    """Stage 1: run the teacher once and store its targets. Killed, it goes on from the last whole chunk."""
    from ..common.store.reader import TargetStore
    from .cache import CachePlan, CacheProgress, cache_teacher

    of_preset: dict[str, Any] = {}
    if preset is not None:
        typed = given(context)
        wanted, areas, number = views_of_preset(preset)
        if "recipe" not in typed:
            recipe, overrides = wanted, overrides.over(areas)
        usual = {"views": number, "patches": PatchChoice(NONE)}  # no preset's objective reads a grid
        of_preset = {name: value for name, value in usual.items() if name not in typed}
    full = config(recipe=get_recipe(recipe, overrides), **of_preset)
    kind = full.encoding.kind
    if kind != "topk":
        refuse(context, ("topk",), f"is for --encoding topk, and this is {kind}")
    if kind != "embedding":
        refuse(context, ("store_dtype",), f"is for --encoding embedding, and this is {kind}")
    note_slow_loader(full.loader)
    if preset is not None:
        note(f"--preset {preset}: --recipe {full.recipe.name}, --views {full.views}")

    done = total = 0

    def show(plan: CachePlan) -> None:
        nonlocal done
        done = 0
        meanwhile = f", and {plan.temporary_bytes_per_view:,} until it is done" if plan.temporary_bytes_per_view else ""
        patches = f", {plan.patch_bytes_per_view:,} of them for patches" if plan.patch_bytes_per_view else ""
        rows = [
            ("images x views", f"{plan.num_images:,} x {plan.views}"),
            ("bytes a view", f"{plan.bytes_per_view:,}{patches}{meanwhile}"),
            ("total", f"{plan.total_bytes / 1e6:,.1f} MB before compression"),
        ]
        rows += [] if is_address(full.out) else [("free disk", f"{plan.free_bytes / 1e9:,.1f} GB")]
        rows += [("done before", f"{plan.rows_done:,} images")] if plan.rows_done else []
        rows += [("estimated time", f"{plan.seconds:,.0f} s at {plan.views_per_second:,.0f} views/s")]
        facts("plan", rows)
        for advice in plan.advice() if preset is None else ():
            note(advice)

    try:
        with bar("caching", "images") as update, bar("fitting prototypes", "batches") as fitting:

            def written(rows: int, of: int) -> None:
                nonlocal done, total
                done, total = max(done, rows), of
                update(done, total)

            def seen(images: int) -> None:  # a chunk takes a minute where the teacher is large
                written(min(done + images, total), total)

            made = cache_teacher(full, CacheProgress(show, written, seen, note, fitting, say_waiting))
    except KeyboardInterrupt:
        note("stopped: run the same command again to go on from the last whole chunk")
        raise KeyboardInterrupt("told") from None
    is_there = place_of(full.out).exists("zarr.json")
    if is_there and TargetStore.open(full.out).manifest == made:  # not the one that it shall replace
        note(f"{shown(full.out)}: complete")


def teachers(
    name: Annotated[
        str | None,
        Setting("One of them: everything about it, with where to download its file.", argument="NAME"),
    ] = None,
) -> None:
    """The published teachers, with their licences."""
    from .registry import teacher_table

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
    say("rob teachers NAME says where its file is, what its head is made of, and how the file names its parts.")
    say("MLP: the projection head. K prototypes behind it, whose logits have the temperature in the method's targets.")
    say(
        "Without prototypes the targets are embeddings (of the backbone only, where there is no MLP), or prototypes fitted to "
        "them: rob cache-teacher --prototypes K. Any other timm model is such a teacher."
    )


def verify(config: VerifyConfig) -> None:
    """Check a store's targets against the teacher."""
    from .verify import VerifyProgress, verify

    with bar("chunks", "chunks") as chunks, bar("views", "views") as views:
        result = verify(config, VerifyProgress(chunks, views))
    note(
        f"{shown(config.store)}: every chunk is whole; {len(result.samples)} views agree, "
        f"mean cosine {result.mean_cosine:.6f}, lowest {result.lowest_cosine:.6f}"
    )
