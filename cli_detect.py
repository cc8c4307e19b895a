"""rob eval detect."""

from pathlib import Path
from typing import Annotated

import typer

from rob import cli_options as o
from rob.cli import bar, note
from rob.cli_eval import Out, evaluate, show_accuracies


@evaluate.command()
def detect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a student's weights.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder in VOC's layout (ImageSets/Main/NAME.txt, Annotations, JPEGImages) or in COCO's "
            "(annotations/instances_NAME.json, images in NAME/)."
        ),
    ],
    train: Annotated[
        str, typer.Option(help="NAME of the images to train on: train, trainval, train2017 ...")
    ] = "train",
    test: Annotated[
        str, typer.Option(help="NAME of the images to test on; val while you choose settings, test once.")
    ] = "test",
    init: Annotated[
        str, typer.Option(help="student, or random: the same network untrained, for comparison.")
    ] = "student",
    side: Annotated[
        int, typer.Option(min=32, help="Shorter side in pixels that images are scaled to. Half is four times as fast.")
    ] = 800,
    channels: Annotated[
        int, typer.Option(min=8, help="Of the pyramid and its heads: 256 as published, 64 on a CPU.")
    ] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 12,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 4,
    lr: Annotated[
        float, typer.Option(min=1e-8, max=10, help="Peak; lower it when the loss stops being a number.")
    ] = 2e-4,
    seed: o.Seed = 0,
    out: Out = None,
    device: o.Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes; 0 decodes in the main one.")] = 0,
) -> None:
    """Box and mask AP of a Faster or Mask R-CNN with the student as its backbone, all of it fine-tuned."""
    from rob.student_train.evaluate.detection.detect import DetectConfig, DetectProgress
    from rob.student_train.evaluate.detection.detect import detect as fit
    from rob.student_train.evaluate.results import write_result

    config = DetectConfig(
        run,
        data,
        train,
        test,
        init,
        side,
        channels,
        epochs,
        batch_size,
        lr,
        seed=seed,
        workers=workers,
        device=device,
    )
    folder = out or (run if run.is_dir() else None)
    with bar("training", "steps") as training, bar("testing", "images") as testing:
        result = fit(config, folder, DetectProgress(training, testing))
    show_accuracies(
        f"detection with {result.student}, {init} initialisation, on {result.num_test} images",
        ("", "AP %", "AP50 %", "AP75 %"),
        [
            (name, score.ap, score.ap50, score.ap75)
            for name, score in (("box", result.box), ("mask", result.mask))
            if score
        ]
        + [(f"box, {name}", ap, None, None) for name, ap in result.per_class.items()],
    )
    if folder:
        task = "detect" if init == "student" else f"detect-{init}"
        settings = {"train": f"{data} {train}", "test": f"{data} {test}", "side": side, "channels": channels}
        settings |= {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
        note(f"written to {write_result(folder, task, {**settings, **result.to_json()})}")
