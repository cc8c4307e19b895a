"""What ``rob eval`` measures: a student, a teacher or raw pixels, with its images and the folder that keeps its results."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...common.config import Checkpoint, Device
from ...common.errors import FailureError, MisuseError
from ...common.options import refuse
from ...common.screen import bar, note, note_slow_loader, say_waiting
from ...common.settings import Setting, check
from ...common.views.config import LoaderConfig
from ...common.views.recipes import INTERPOLATIONS
from ..evaluate.config import FEATURES, INITS

if TYPE_CHECKING:
    from ..evaluate.labelled import LabelledImages
    from ..evaluate.network import FrozenNetwork
    from ..students import StudentInfo

What = Annotated[
    str,
    Setting(
        "A run folder or its address, a student's weights or ONNX file, teacher, or pixels.",
        argument="WHAT",
    ),
]
Train = Annotated[Path, Setting("Labelled images to learn from.", argument="TRAIN.beton")]
Test = Annotated[
    Path | None,
    Setting("Labelled images to test on; default a fifth of each class of TRAIN, the same for every network."),
]
Out = Annotated[Path | None, Setting("Its eval folder takes features and results; default the run folder.")]
LoadTeacher = Callable[[str, Path | None], Any]
"""A teacher by name and checkpoint, which is the other stage's: ``cli.py`` hands it in."""


@dataclass(frozen=True)
class SubjectConfig:
    """Of what is evaluated, and of how its images are read."""

    init: Annotated[
        str,
        Setting("student, or random: WHAT's network untrained, the floor of what training adds.", choices=INITS),
    ] = "student"
    teacher: Annotated[str | None, Setting("Its name, when WHAT is teacher.")] = None
    checkpoint: Checkpoint = None
    size: Annotated[int | None, Setting("Side in pixels; default the network's own (pixels: 32).", low=4)] = None
    features: Annotated[
        str | None,
        Setting(
            "Of a ViT: cls, its class token; mean, of its patch tokens; cls+mean, both, as DINOv2; cls4, the class tokens of "
            "the last four blocks, as DINO's and RoB's linear evaluation. Default what the network pools.",
            choices=FEATURES,
        ),
    ] = None
    interpolation: Annotated[
        str,
        Setting(
            "Filter of the resize: bicubic as in DINO's and RoB's evaluation, or bilinear.", choices=INTERPOLATIONS
        ),
    ] = "bicubic"
    out: Out = None
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(batch_size=128))
    device: Device = "auto"

    def __post_init__(self) -> None:
        check(self)


class Subject:
    """The network, its images, and the folder that keeps features and results (None: nothing is kept)."""

    def __init__(self, context: typer.Context, what: str, config: SubjectConfig, load_teacher: LoadTeacher) -> None:
        from ..run_folder import is_run

        if what != "teacher":
            refuse(context, ("teacher", "checkpoint"), f"is for a teacher, and WHAT is {what}")
        if what in ("pixels", "teacher") and config.out is not None and is_run(config.out):
            raise MisuseError(f"`out` {config.out} is a run, whose results are of its student: give another folder")
        note_slow_loader(config.loader)
        self.loader = config.loader
        self.suffix = "" if config.init == "student" else f"-{config.init}"
        say_waiting(f"loading {what}")
        network = frozen_network(what, config, load_teacher)
        self.network = on_all_ranks(network.of(config.features, config.interpolation), config.loader)
        self.folder = config.out or (Path(what) if Path(what).is_dir() else None)

    def images(self, data: Path, test: Path | None) -> "tuple[LabelledImages, LabelledImages]":
        """Train and test images with their features."""
        from ...common.images.beton import Beton
        from ..evaluate.labelled import labelled_images

        if test is not None and Beton(test).manifest.fingerprint == Beton(data).manifest.fingerprint:
            note(f"{test} holds the very images of {data}: the result says nothing of other images")
        with bar("features", "images") as update, last_asked_here(self.network):
            return labelled_images(self.network, data, test, self.loader, self.folder, update)

    def write(self, task: str, data: Path, test: Path | None, result: Mapping[str, Any]) -> None:
        from ...common.images.beton import Beton
        from ..evaluate.results import write_result

        if not self.folder:
            return
        fingerprint = Beton(data).manifest.fingerprint
        facts = {
            "features": self.network.name,
            "weights": self.network.source,
            "image_size": self.network.size,
            **self.network.unusual,
            "train": str(data),
            "train_fingerprint": fingerprint,
            "test": str(test) if test else f"a fifth of {data}",
            "test_fingerprint": Beton(test).manifest.fingerprint if test else f"a fifth of {fingerprint}",
        }
        note(f"written to {write_result(self.folder, task + self.suffix, {**facts, **result}, note)}")


def on_all_ranks(network: "FrozenNetwork", loader: LoaderConfig) -> "FrozenNetwork":
    """Under torchrun, on rank 0, the network whose features all ranks extract. The others help with that, and the command ends
    for them here."""
    from ...common.ranks import join_ranks, leave_ranks, lost_ranks_are_a_failure

    network = replace(network, ranks=join_ranks())
    if network.ranks.is_main:
        return network
    with lost_ranks_are_a_failure():
        network.help(loader)
    leave_ranks()
    raise typer.Exit


@contextmanager
def last_asked_here(network: "FrozenNetwork") -> Iterator[None]:
    """After the block the other ranks have left; if it raises, they end as if a rank had died."""
    from ...common.ranks import leave_ranks, lost_ranks_are_a_failure

    with lost_ranks_are_a_failure():
        yield
        network.let_go()
        leave_ranks()


def frozen_network(what: str, config: SubjectConfig, load_teacher: LoadTeacher, seed: int = 0) -> "FrozenNetwork":
    """What the words on the command line name; ``seed`` is that of random weights."""
    from ...common.run import pick_device
    from ..evaluate.network import FrozenNetwork

    size, device = config.size, pick_device(config.device)
    if config.init == "random":
        if what in ("pixels", "teacher") or what.endswith(".onnx"):
            raise MisuseError(f"`init` random is for a run or a student's weights, and WHAT is {what}: leave it out")
        return FrozenNetwork.untrained(describe(Path(what)), seed, device, size)
    if what == "pixels":
        return FrozenNetwork.pixels(size or 32, device)
    if what == "teacher":
        if config.teacher is None:
            raise MisuseError("rob eval ... teacher needs --teacher NAME (rob teachers lists them)")
        model = load_teacher(config.teacher, config.checkpoint).to(device)
        return FrozenNetwork.teacher(model, size or model.view_size, device)
    if what.endswith(".onnx"):
        network = FrozenNetwork.onnx(Path(what))
        if size not in (None, network.size):
            raise MisuseError(f"`size` is {size}, and {what} takes {network.size} px alone: leave `size` out")
        return network
    return FrozenNetwork.student(Path(what), device, size)


def describe(what: Path) -> "StudentInfo":
    """The student of a run, which need not have ended or even begun to save, or of a weights file. MisuseError: there is none."""
    from ...common.records import read_record
    from ..checkpoint import load_student
    from ..students import StudentInfo

    try:
        config = read_record(what / "config.json", dict[str, Any], "", unchecked=True)
        return StudentInfo.from_dict(config["student_info"])
    except (OSError, FailureError, ValueError, KeyError, TypeError):
        return load_student(what)[1]
