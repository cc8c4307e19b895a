"""The commands that evaluate: rob eval TASK."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rob import cli_options as o
from rob.cli import app, bar, console, note, say_which_loader
from rob.common.errors import MisuseError

evaluate = typer.Typer(
    help="Measure a student, a teacher or raw pixels. Features are extracted once and kept in the run's eval folder.",
    no_args_is_help=True,
)
app.add_typer(evaluate, name="eval")

What = Annotated[str, typer.Argument(metavar="WHAT", help="A run folder, a student's weights, teacher, or pixels.")]
Train = Annotated[Path, typer.Argument(metavar="TRAIN.beton", help="Labelled images to learn from.")]
Test = Annotated[
    Path | None,
    typer.Option(
        help="Labelled images to test on; default a fifth of each class of TRAIN, the same for every network."
    ),
]
TeacherOfEval = Annotated[str | None, typer.Option("--teacher", help="Its name, when WHAT is teacher.")]
Size = Annotated[int | None, typer.Option(min=4, help="Side in pixels; default the network's own (pixels: 32).")]
Out = Annotated[Path | None, typer.Option(help="Its eval folder takes features and results; default the run folder.")]
Init = Annotated[
    str,
    typer.Option(help="student, or random: WHAT's network untrained, the floor of what training adds."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass. Lower it when memory runs out.")]


@evaluate.command()
def knn(
    what: What,
    data: Train,
    test: Test = None,
    k: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Neighbours that vote, 20 by default. Several times: a sweep, of which the first is the result."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.001, help="Of the votes.")] = 0.07,
    init: Init = "student",
    teacher: TeacherOfEval = None,
    checkpoint: o.Checkpoint = None,
    size: Size = None,
    out: Out = None,
    batch_size: BatchSize = 128,
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
) -> None:
    """Weighted k-nearest-neighbour accuracy, as DINO defines it."""
    from rob.student_train.evaluate.knn import knn_sweep

    subject = Subject(what, init, teacher, checkpoint, size, out, batch_size, device, loader, workers)
    train, held_out = subject.images(data, test)
    results = knn_sweep(train.features, held_out.features, k or [20], temperature)
    show_accuracies(
        f"k-NN of {subject.network.name}",
        ("k", "top-1 %", "top-5 %", "train images", "test images"),
        [(r.k, r.top1, r.top5, r.num_train, r.num_test) for r in results],
    )
    sweep = [result.to_json() for result in results]
    subject.write("knn", data, test, {**sweep[0], "sweep": sweep})


@evaluate.command()
def linear(
    what: What,
    data: Train,
    test: Test = None,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment", help="Random crops and flips, as DINO does: a forward pass of every image in every epoch."
        ),
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over TRAIN; 100 as DINO.")] = 100,
    lr: Annotated[
        list[float] | None,
        typer.Option(min=1e-8, max=100, help="Learning rates to choose from, 0.001 to 0.1; give it several times."),
    ] = None,
    weight_decay: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Weight decays to choose from; give it several times.")
    ] = None,
    seed: o.Seed = 0,
    init: Init = "student",
    teacher: TeacherOfEval = None,
    checkpoint: o.Checkpoint = None,
    size: Size = None,
    out: Out = None,
    batch_size: BatchSize = 128,
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
) -> None:
    """A linear classifier on frozen features: a sweep in one pass, the choice made on a tenth of TRAIN, one test."""
    from rob.student_train.evaluate.linear import LinearConfig
    from rob.student_train.evaluate.linear import linear as run
    from rob.student_train.evaluate.linear_augmented import linear_augmented

    config = LinearConfig(epochs=epochs, seed=seed)
    if lr:
        config = replace(config, learning_rates=tuple(lr))
    if weight_decay:
        config = replace(config, weight_decays=tuple(weight_decay))
    subject = Subject(what, init, teacher, checkpoint, size, out, batch_size, device, loader, workers)
    task = "linear-augment" if augment else "linear"
    train, held_out = subject.images(data, test)
    with bar("training", "epochs") as update:
        if augment:
            saved = subject.folder and subject.folder / "eval" / f"{task}.checkpoint.pt"
            result = linear_augmented(
                subject.network, train, held_out.features, config, subject.loader, checkpoint=saved, progress=update
            )
        else:
            where = subject.network.device
            result = run(train.features.to(where), held_out.features.to(where), config, update)
    show_accuracies(
        f"linear classifier on {subject.network.name}",
        ("learning rate", "weight decay", "validation %", "top-1 %", "top-5 %"),
        [
            (f"{s.learning_rate:g}", f"{s.weight_decay:g}", s.validation_top1)
            + ((result.top1, result.top5) if s == result.chosen else ("", ""))
            for s in result.sweep
        ],
    )
    subject.write(task, data, test, result.to_json())


@evaluate.command()
def lowshot(
    what: What,
    data: Train,
    test: Test = None,
    percent: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            max=100,
            help="Of each class of TRAIN; give it several times. Default 1 and 10, if no --per-class.",
        ),
    ] = None,
    per_class: Annotated[
        list[int] | None, typer.Option(min=1, help="Images of each class; give it several times.")
    ] = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Train the whole network, not only a classifier on frozen features.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="With --finetune, 30 by default.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            min=1e-8,
            max=10,
            help="With --finetune, of the network, 1e-4 by default; its classifier's is 10 times that.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Subsets: mean and deviation are over them.")] = 5,
    init: Init = "student",
    teacher: TeacherOfEval = None,
    checkpoint: o.Checkpoint = None,
    size: Size = None,
    out: Out = None,
    batch_size: BatchSize = 128,
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
) -> None:
    """Few labels: fixed subsets by seed, logistic regression on frozen features or --finetune; mean and deviation."""
    from rob.student_train.evaluate.finetune import FinetuneConfig, finetune_lowshot
    from rob.student_train.evaluate.lowshot import REGULARISATION, Share
    from rob.student_train.evaluate.lowshot import lowshot as run

    if not finetune:
        o.refuse({"--epochs": epochs, "--lr": lr}, "is for --finetune")
    tuning = FinetuneConfig(epochs or FinetuneConfig.epochs, lr or FinetuneConfig.lr)
    percents = percent or ([] if per_class else [1.0, 10.0])
    shares = [Share(fraction=p / 100) for p in percents] + [Share(per_class=n) for n in per_class or []]
    subject = Subject(what, init, teacher, checkpoint, size, out, batch_size, device, loader, workers)
    train, held_out = subject.images(data, test)
    task = "lowshot-finetune" if finetune else "lowshot"
    settings = {"epochs": tuning.epochs, "lr": tuning.lr} if finetune else {"regularisation": REGULARISATION}
    results = []
    for share in shares:
        with bar(str(share), "subsets") as update:
            if finetune:
                kept = subject.folder and subject.folder / "eval" / "finetune"
                result = finetune_lowshot(
                    subject.network, train, held_out, tuning, subject.loader, share, range(seeds), kept, update
                )
            else:
                where = subject.network.device
                result = run(
                    train.features.to(where), held_out.features.to(where), share, range(seeds), progress=update
                )
        results.append(result)
    show_accuracies(
        f"few labels, {subject.network.name} {'fine-tuned' if finetune else 'frozen'}",
        ("labels", "train images", "top-1 %", "deviation", "seeds"),
        [
            (str(r.share), r.num_train, r.mean, "" if r.deviation is None else r.deviation, len(r.seeds))
            for r in results
        ],
    )
    subject.write(task, data, test, {**settings, "results": [r.to_json() for r in results]})


@evaluate.command()
def transfer(
    what: What,
    task: Annotated[
        str,
        typer.Argument(
            help="cifar10, cifar100, inaturalist2018, inaturalist2019, inaturalist2021, inaturalist2021-mini, places365, "
            "clevr-count, clevr-dist, or folder: ROOT/train/CLASS and ROOT/test/CLASS (or val)."
        ),
    ],
    root: Annotated[Path, typer.Option(help="Where the data lie; a task that is not there says what goes where.")],
    download: Annotated[bool, typer.Option("--download", help="Fetch what is missing, where torchvision can.")] = False,
    packed: Annotated[
        Path | None, typer.Option(help="Folder for the packed images, which are used again; default ROOT/packed.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many training images, spread evenly.")] = None,
    max_resolution: Annotated[int, typer.Option(min=8, help="Longest side in pixels of the packed images.")] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="Of the linear classifier.")] = 100,
    seed: o.Seed = 0,
    init: Init = "student",
    teacher: TeacherOfEval = None,
    checkpoint: o.Checkpoint = None,
    size: Size = None,
    out: Out = None,
    batch_size: BatchSize = 128,
    device: o.Device = "auto",
    loader: o.LoaderPath = "auto",
    workers: o.Workers = 0,
) -> None:
    """Another task: a linear classifier on frozen features, chosen as by rob eval linear, and k-NN."""
    from rob.student_train.evaluate.knn import knn as neighbours
    from rob.student_train.evaluate.linear import LinearConfig
    from rob.student_train.evaluate.linear import linear as run
    from rob.student_train.evaluate.transfer import packed_task

    subject = Subject(what, init, teacher, checkpoint, size, out, batch_size, device, loader, workers)
    with bar("packing", "images") as update:
        paths = packed_task(
            task,
            root,
            packed or root / "packed",
            download=download,
            limit=limit,
            max_resolution=max_resolution,
            progress=update,
        )
    train, held_out = subject.images(*paths)
    where = subject.network.device
    features = train.features.to(where), held_out.features.to(where)
    with bar("training", "epochs") as update:
        result = run(*features, LinearConfig(epochs=epochs, seed=seed), update)
    nearest = neighbours(*features, k=min(20, len(train.features)))
    show_accuracies(
        f"{task} with {subject.network.name}",
        ("", "top-1 %", "top-5 %", "train images", "test images"),
        [
            ("linear", result.top1, result.top5, result.num_train, result.num_test),
            ("k-NN", nearest.top1, nearest.top5, nearest.num_train, nearest.num_test),
        ],
    )
    subject.write(f"transfer-{task}", *paths, {**result.to_json(), "knn": nearest.to_json()})


# ==== what the commands share ====


class Subject:
    """What is evaluated, how its images are read, and the folder that keeps features and results (None: nothing is kept)."""

    def __init__(
        self,
        what: str,
        init: str,
        teacher: str | None,
        checkpoint: Path | None,
        size: int | None,
        out: Path | None,
        batch_size: int,
        device: str,
        loader: str,
        workers: int,
    ) -> None:
        from rob.common.views.loader import LoaderConfig

        self.loader = LoaderConfig(loader, batch_size, workers)
        say_which_loader(self.loader)
        self.suffix = "" if init == "student" else f"-{init}"
        self.network = frozen_network(what, init, teacher, checkpoint, size, device)
        self.folder = out or (Path(what) if Path(what).is_dir() else None)

    def images(self, data: Path, test: Path | None) -> Any:
        """Train and test images with their features."""
        from rob.student_train.evaluate.labelled import labelled_images

        with bar("features", "images") as update:
            return labelled_images(self.network, data, test, self.loader, self.folder, update)

    def write(self, task: str, data: Path, test: Path | None, result: dict[str, Any]) -> None:
        from rob.common.images.beton import Beton
        from rob.student_train.evaluate.results import write_result

        if not self.folder:
            return
        facts = {
            "features": self.network.name,
            "weights": self.network.source,
            "image_size": self.network.size,
            "train": str(data),
            "train_fingerprint": Beton(data).manifest.fingerprint,
            "test": str(test) if test else f"a fifth of {data}",
            "test_fingerprint": Beton(test).manifest.fingerprint
            if test
            else f"a fifth of {Beton(data).manifest.fingerprint}",
        }
        note(f"written to {write_result(self.folder, task + self.suffix, {**facts, **result}, note)}")


def show_accuracies(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table; whole numbers with separators, others with two decimals, texts as they are, None as nothing."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{x:,}" if isinstance(x, int) else f"{x:,.2f}" if isinstance(x, float) else x for x in row))
    console.print(table)


def frozen_network(
    what: str, init: str, teacher: str | None, checkpoint: Path | None, size: int | None, device: str
) -> Any:
    """What ``rob eval`` measures, by the words on the command line."""
    from rob.common.errors import unknown_name
    from rob.common.run import pick_device
    from rob.student_train.checkpoint import load_student
    from rob.student_train.evaluate.network import FrozenNetwork
    from rob.teacher_cache.teachers import TeacherConfig, load_teacher

    where = pick_device(device)
    if what != "teacher":
        o.refuse({"--teacher": teacher, "--checkpoint": checkpoint}, f"is for a teacher, and WHAT is {what}")
    if init not in ("student", "random"):
        raise unknown_name("initialisation", init, ("student", "random"))
    if init == "random":
        if what in ("pixels", "teacher"):
            raise MisuseError(f"--init random is for a run or a student's weights, and WHAT is {what}: leave it out")
        return FrozenNetwork.untrained(load_student(Path(what))[1], 0, where, size)
    if what == "pixels":
        return FrozenNetwork.pixels(size or 32, where)
    if what == "teacher":
        if teacher is None:
            raise MisuseError("rob eval ... teacher needs --teacher NAME (rob teachers lists them)")
        model = load_teacher(TeacherConfig(teacher, checkpoint)).to(where)
        return FrozenNetwork.teacher(model, size or model.view_size, where)
    return FrozenNetwork.student(Path(what), where, size)
