"""The commands of what both stages share: pack, inspect, views, doctor."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .config import Overwrite, RecipeName, Seed
from .errors import BRINGS, FailureError, MisuseError, printable
from .files import refuse_existing
from .images.config import PackConfig
from .look.config import Images, ImageSize
from .options import given, refuse
from .places import is_address
from .screen import bar, facts, note
from .settings import Setting
from .views.recipes import USUAL_RECIPE, RecipeOverrides, get_recipe


def pack(config: PackConfig, overwrite: Overwrite = False) -> None:
    """Pack images into one .beton file."""
    from rich.filesize import decimal

    from .images.pack import pack

    if config.append and overwrite:
        raise MisuseError("--append adds to what is there, and --overwrite replaces it: leave one of them out")
    refuse_existing(config.out, overwrite or config.append)
    with bar("packing", "images") as update:
        manifest = pack(config, update, note=note)
    for path in manifest.skipped:
        note(f"skipped {printable(path)}: broken")  # in one line, whatever is in it
    size, classes, images = config.out.stat().st_size, len(manifest.classes or ()), manifest.num_images
    classified = f"{classes:,} class{'es' * (classes != 1)}" if classes else "no classes"
    note(f"{config.out}: {images:,} image{'s' * (images != 1)}, {decimal(size)}, {classified}")
    if config.append:
        more = manifest.num_images - manifest.grown[-1][0]
        note(f"{more:,} of them are new; a store of the others is given theirs by the same rob cache-teacher again")


def inspect(
    context: typer.Context,
    path: Annotated[Path, Setting("A .beton or a target store.", argument="FILE")],
    sheet: Annotated[
        Path | None,
        Setting(
            "Draw a contact sheet to this PNG: the first images with their views, and a store's nearest neighbours."
        ),
    ] = None,
    data: Annotated[Path | None, Setting("With --sheet for a store: the .beton it was cached from.")] = None,
    recipe: RecipeName = USUAL_RECIPE,
    images: Images = 4,
    overwrite: Overwrite = False,
) -> None:
    """Show what a .beton or a target store holds."""
    from .look.config import SheetConfig
    from .look.contact_sheet import contact_sheet
    from .look.contents import inspect

    if sheet is not None:
        refuse_existing(sheet, overwrite)
    else:
        refuse(context, ("images", "recipe", "data"), "is for the picture that --sheet draws")
    found = inspect(path)
    facts(found.title, found.rows)
    if sheet is None:
        return
    is_store = path.is_dir() or (is_address(path) and path.suffix != ".beton")
    if is_store and data is None:
        raise MisuseError("--sheet of a store needs its images: pass --data DATA.beton")
    if is_store:
        refuse(context, ("recipe",), "is for a .beton, and a store's sheet has the views that it was cached with")
    config = SheetConfig(
        data=data if is_store and data else path,
        out=sheet,
        store=path if is_store else None,
        recipe=get_recipe(recipe),
        images=images,
    )
    note(f"written to {contact_sheet(config)}")


def views(
    context: typer.Context,
    out: Annotated[Path, Setting("The picture to draw.", argument="PREVIEW.png")],
    data: Annotated[Path, Setting("Images packed by rob pack.")],
    overrides: RecipeOverrides,
    recipe: RecipeName = USUAL_RECIPE,
    preset: Annotated[
        str | None,
        Setting("The crops of rob train-student --preset: rob-dino, sslight-cnn ... What else is given beats it."),
    ] = None,
    images: Annotated[int, Setting("Images to draw, spread over the data set; at most 64.", low=1)] = 4,
    image_size: ImageSize = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    *,
    crops_of_preset: Callable[[str], tuple[str, RecipeOverrides]],
) -> None:
    """Draw what a recipe does: crops, how pairs differ.

    Look for: crops that no longer show the object (raise the LOW of a scale), colours that matter and are gone (--colour 0), and
    crops of a pair that differ far more than recipe dino's do, by the medians shown: small networks learn badly from such pairs.
    """
    from .look.config import SheetConfig
    from .look.contact_sheet import contact_sheet

    refuse_existing(out, overwrite)
    if preset is not None:
        wanted, usual = crops_of_preset(preset)
        if "recipe" not in given(context):
            recipe, overrides = wanted, overrides.over(usual)
    drawn = get_recipe(recipe, overrides)
    config = SheetConfig(
        data, out, images=images, spread=True, recipe=drawn, seed=seed, image_size=image_size, ratios=True
    )
    note(f"written to {contact_sheet(config)}")


def doctor() -> None:
    """What is installed, what is fast here, what is missing.

    Exit code 1 where something that rob cannot do without is missing.
    """
    from .doctor import extras, installed, machine, paths

    facts(f"rob {installed('rob') or 'from a checkout that is not installed'}", [*machine(), *paths()])
    found = {extra.name: extra for extra in extras()}
    own = found.pop("", None)
    if there := [(extra.name, extra.purpose) for extra in found.values() if not extra.missing]:
        facts("installed", there)
    absent = [extra for extra in found.values() if extra.missing]
    if absent:
        facts("not installed, or too old", [(x.name, x.purpose, ", ".join(x.missing)) for x in absent])
        note(f"{BRINGS.format('NAME')} brings one of them, by its name in the first column")
    if "ffcv" in (extra.name for extra in absent):
        note("make venv brings ffcv with the system libraries that it is compiled with, on Debian and Ubuntu")
    if own is None:
        note("rob is not installed, so what it wants is not known: pip install -c constraints.txt -e . in the clone")
    elif own.missing:
        raise FailureError(
            f"rob lacks {', '.join(own.missing)}: pip install -c constraints.txt -e . in the clone brings it"
        )
