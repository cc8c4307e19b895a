"""``rob eval segment``."""

from pathlib import Path
from typing import Annotated

import typer

from ...common.options import refuse
from ...common.screen import bar, note, show_table
from ..evaluate.config import SegmentConfig
from .subject import LoadTeacher, SubjectConfig, What, frozen_network


def segment(
    context: typer.Context,
    what: What,
    config: SegmentConfig,
    subject: Annotated[SubjectConfig, {"features": None, "loader": None}],
    *,
    load_teacher: LoadTeacher,
) -> None:
    """Mean IoU of a linear probe (BatchNorm and 1x1 convolution) on frozen patch features."""
    from ...common.ranks import refuse_ranks
    from ..evaluate.results import write_result
    from ..evaluate.segmentation.linear import SegmentProgress, segment

    refuse_ranks("rob eval segment")
    if what != "teacher":
        refuse(context, ("teacher", "checkpoint"), f"is for a teacher, and WHAT is {what}")
    network = frozen_network(what, subject, load_teacher, config.seed).of(None, subject.interpolation)
    with bar("maps", "images") as maps, bar("training", "steps") as steps, bar("testing", "images") as tested:
        result = segment(network, config, SegmentProgress(maps, steps, tested, note))
    show_table(
        f"segmentation with {network.name} at {network.size} px, {result.positions} x {result.positions} positions, "
        f"{result.num_test} images",
        ("", "%"),
        [("mean IoU", result.score.miou), ("pixels right", result.score.pixel_accuracy)]
        + [(f"IoU, {name}", iou) for name, iou in result.score.iou.items()],
    )
    folder = subject.out or (Path(what) if Path(what).is_dir() else None)
    if folder:
        task = "segment" if subject.init == "student" else f"segment-{subject.init}"
        settings = {
            "weights": network.source,
            "image_size": network.size,
            **network.unusual,
            "train": str(config.train),
            "test": str(config.test),
        }
        settings |= {"layer": config.layer, "epochs": config.epochs, "lr": config.lr, "seed": config.seed}
        note(f"written to {write_result(folder, task, {**settings, **result.to_json()}, note)}")
