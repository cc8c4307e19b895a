"""``rob embed``."""

from pathlib import Path
from typing import Annotated

import typer

from ...common.config import Data, Overwrite
from ...common.options import refuse
from ...common.screen import bar, note, note_slow_loader
from ...common.settings import Setting
from .subject import LoadTeacher, SubjectConfig, What, frozen_network, last_asked_here, on_all_ranks


def embed(
    context: typer.Context,
    what: What,
    data: Data,
    out: Annotated[Path, Setting("OUT.npy, with the paths beside it in OUT.csv, or OUT.parquet.", argument="OUT")],
    overwrite: Overwrite = False,
    *,
    config: Annotated[SubjectConfig, {"out": None, "init": None}],
    load_teacher: LoadTeacher,
) -> None:
    """The features of every image in one file, by path. Killed, the same command goes on."""
    from ..embed import EmbedConfig, embed

    if what != "teacher":
        refuse(context, ("teacher", "checkpoint"), f"is for a teacher, and WHAT is {what}")
    run = Path(what) if Path(what).is_dir() else None
    settings = EmbedConfig(data, out, config.loader, run, overwrite)
    note_slow_loader(config.loader)
    network = frozen_network(what, config, load_teacher).of(config.features, config.interpolation)
    network = on_all_ranks(network, config.loader)
    with bar("features", "images") as update, last_asked_here(network):
        files = embed(network, settings, update)
    note(f"{network.title}: written to {', '.join(map(str, files))}")
