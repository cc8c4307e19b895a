"""The commands that look and measure: teachers, inspect, verify, eval, bench, demo."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rob import cli_options as o
from rob.cli import app, console, note, say_which_loader
from rob.common.errors import MisuseError

evaluate = typer.Typer(help="Measure frozen features.", no_args_is_help=True)
app.add_typer(evaluate, name="eval")


@evaluate.command()
def knn(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run folder, a student's weights, teacher, or pixels.")],
    data: Annotated[Path, typer.Argument(metavar="TRAIN.beton", help="Labelled images to search in.")],
    test: Annotated[Path, typer.Option(help="Labelled images to classify.")],
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    temperature: Annotated[float, typer.Option(min=0.001, help="Of the votes.")] = 0.07,
    teacher: Annotated[str | None, typer.Option(help="Its name, when WHAT is teacher.")] = None,
    checkpoint: o.Checkpoint = None,
    size: Annotated[
        int | None, typer.Option(min=4, help="Side in pixels; default the network's own (pixels: 32).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for eval/knn.json; default the run folder.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
) -> None:
    """Weighted k-nearest-neighbour accuracy, top-1 and top-5."""
    from rob.common.loader import LoaderConfig
    from rob.student_train.evaluate.knn import knn as run

    config = LoaderConfig(loader, batch_size, workers)
    say_which_loader(config)
    network = frozen_network(what, teacher, checkpoint, size, device)
    folder = out or (Path(what) if Path(what).is_dir() else None)
    train, held_out = (network.features(path, config, folder) for path in (data, test))
    result = run(train, held_out, k, temperature)
    table = Table(title=f"k-NN of {network.name}", title_justify="left")
    for column in ("k", "top-1 %", "top-5 %", "train images", "test images"):
        table.add_column(column, justify="right")
    table.add_row(str(k), f"{result.top1:.2f}", f"{result.top5:.2f}", f"{result.num_train:,}", f"{result.num_test:,}")
    console.print(table)
    if folder:
        path = folder / "eval" / "knn.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"features": network.name, **result.to_json()}, indent=2) + "\n")
        note(f"written to {path}")


def frozen_network(what: str, teacher: str | None, checkpoint: Path | None, size: int | None, device: str) -> Any:
    """What ``rob eval`` measures, by the word on the command line."""
    from rob.common.run import pick_device
    from rob.student_train.evaluate.network import FrozenNetwork
    from rob.teacher_cache.teachers import TeacherConfig, load_teacher

    where = pick_device(device)
    if what == "pixels":
        return FrozenNetwork.pixels(size or 32, where)
    if what == "teacher":
        if teacher is None:
            raise MisuseError("rob eval knn teacher needs --teacher NAME (rob teachers lists them)")
        model = load_teacher(TeacherConfig(teacher, checkpoint)).to(where)
        return FrozenNetwork(
            model.name, model, size or model.view_size, model.mean, model.std, model.weights_hash, where
        )
    return FrozenNetwork.student(Path(what), where, size)
