"""What can be set of targets. The configurations are beside what they open: ``cached``, ``online``, ``momentum``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from ...common.settings import Setting

if TYPE_CHECKING:
    from .branch import RunContext, TargetBranch

WindowMib = Annotated[
    float, Setting("Memory for targets read ahead. More shuffles better where a row is large.", low=1)
]
CacheInMemory = Annotated[bool, Setting("Keep all targets in memory from epoch to epoch.", option="--cache-in-memory")]
Views = Annotated[int, Setting("With --targets online: views of an image that the teacher would have cached.", low=1)]
CopyPrototypes = Annotated[
    int | None,
    Setting(
        "With --targets momentum: K; default 4096 for dino, 8192 ibot, 3000 swav, 1024 msn. Fewer for small data.",
        low=2,
        group="Without a teacher",
    ),
]
CopyMomentum = Annotated[
    float | None,
    Setting(
        "With --targets momentum or --with-copy: of the copy, at the start; a cosine takes it to 1 (moco, disco: it stays; msn: "
        "four fifths of the way, in a line). Default 0.996 (moco, disco 0.999). Runs of a few thousand steps want 0.99, with "
        "--sinkhorn batch 0.9; with less the targets move on faster than their centre or queue, and the loss stays high.",
        low=0,
        high=1,
        group="Without a teacher",
    ),
]
BesideTeacher = Annotated[
    bool,
    Setting(
        "disco, as published: InfoNCE's keys come from a momentum copy of the student beside the teacher. Without it they "
        "are the teacher's, which costs no second forward pass. The copy is exported too.",
        option="--with-copy/--without-copy",
        group="Without a teacher",
    ),
]
WarmupTeacherTempEpochs = Annotated[
    int | None,
    Setting(
        "With --targets momentum and dino or ibot: epochs in which the teacher's temperature rises from 0.04 to "
        "--teacher-temp (one below 0.04 holds from the start). Default 50 (ibot 30): a shorter run ends below, since at 0.07 "
        "a head that is still fresh tends to nearly uniform targets.",
        low=0,
        group="Without a teacher",
    ),
]
SplitBatchnorm = Annotated[
    int | None,
    Setting(
        "With moco and --targets momentum, or disco --with-copy: BatchNorm sees the batch in so many parts (8 for MoCo-v2's "
        "256 images on 8 GPUs), and the keys' parts are of shuffled images, so that a batch's statistics tell no image's key. "
        "A loss that falls fast while k-NN does not rise wants it. 1, the default: the whole batch, unshuffled. Under torchrun a "
        "multiple of the ranks, which exchange images.",
        low=1,
        group="Without a teacher",
    ),
]


class TargetsConfig(Protocol):
    """What fills the target branch of a run."""

    @property
    def stores(self) -> tuple[Path, ...]:
        """Where its targets are cached; none where they are made on the spot."""
        return ()

    def open(self, run: "RunContext") -> "TargetBranch":
        """The branch for ``run``. MisuseError: it cannot serve such a run."""
        ...
