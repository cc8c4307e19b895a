"""``--targets`` of ``rob train-student`` and what belongs to it: options that become what fills the target branch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...common.config import Checkpoint, ViewSize
from ...common.errors import MisuseError
from ...common.options import refuse
from ...common.settings import Setting
from ...common.views.recipes import USUAL_ALONE, USUAL_RECIPE, Recipe, RecipeOverrides, get_recipe
from ..targets.config import (
    BesideTeacher,
    CacheInMemory,
    CopyMomentum,
    CopyPrototypes,
    SplitBatchnorm,
    TargetsConfig,
    Views,
    WarmupTeacherTempEpochs,
    WindowMib,
)
from .subject import LoadTeacher

MADE_ON_THE_SPOT = ("momentum", "online")
OF_A_TEACHER = ("teacher", "checkpoint", "view_size", "views")
OF_ITS_TARGETS = ("prototypes", "warmup_teacher_temp_epochs")
"""What is set of targets that a copy of the student makes."""
OF_THE_COPY = ("copy_momentum", "split_batchnorm")
OF_THE_VIEWS = ("global_scale", "centre", "colour", "flip", "grey", "blur", "solarise", "interpolation")
"""What changes the views that a store's targets belong to."""


@dataclass(frozen=True)
class TargetOptions:
    """Where targets come from: one or several stores, ``online`` or ``momentum``, and what is set of each."""

    targets: Annotated[
        tuple[str, ...],
        Setting(
            "A store made by rob cache-teacher; or online: run the teacher in every step (a baseline); or momentum: no "
            "teacher, the targets come from a momentum copy of the student (dino, ibot, msn, moco) or from itself (swav). "
            "Given several times: an ensemble of stores, cached from as many teachers with one --recipe and --seed; the "
            "student has a head for each."
        ),
    ]
    targets_weight: Annotated[
        tuple[float, ...],
        Setting("With several --targets: the weight of each one's loss, in their order; default equal ones.", low=0),
    ] = ()
    window_mib: WindowMib = 256
    cache_in_memory: CacheInMemory = False
    teacher: Annotated[str | None, Setting("With --targets online: the teacher, as for rob cache-teacher.")] = None
    checkpoint: Checkpoint = None
    view_size: ViewSize = None
    views: Views = 4
    prototypes: CopyPrototypes = None
    copy_momentum: CopyMomentum = None
    with_copy: BesideTeacher = False
    warmup_teacher_temp_epochs: WarmupTeacherTempEpochs = None
    split_batchnorm: SplitBatchnorm = None
    recipe: Annotated[
        str | None,
        Setting(
            "With --targets online or momentum: the views' recipe; default mild with online, dino with momentum. A store has "
            "its own."
        ),
    ] = None

    @property
    def kind(self) -> str:
        """``momentum``, ``online``, or the first store."""
        return self.targets[0]

    @property
    def are_stored(self) -> bool:
        return self.kind not in MADE_ON_THE_SPOT

    def refuse_what_does_not_fit(self, context: typer.Context) -> None:
        """MisuseError: the command line gives what is of other targets."""
        if len(self.targets) > 1 and (other := set(MADE_ON_THE_SPOT) & set(self.targets)):
            raise MisuseError(
                f"--targets {', '.join(self.targets)}: several are stores, and {other.pop()} is none: give it alone"
            )
        if len(self.targets) == 1:
            refuse(context, ("targets_weight",), "is for several --targets, and there is one")
        if self.kind == "momentum":
            refuse(context, OF_A_TEACHER, "is for --targets online; with momentum there is no teacher")
            refuse(context, ("with_copy",), "puts a copy beside a teacher; with momentum there is none")
        else:
            refuse(context, OF_ITS_TARGETS, "is for --targets momentum; a teacher has its own")
            if not self.with_copy:
                refuse(context, OF_THE_COPY, "is for --targets momentum or --with-copy; a teacher stays as it is")
        if self.kind == "online" and self.teacher is None:
            raise MisuseError("--targets online needs --teacher NAME (rob teachers lists them)")
        if self.are_stored:
            named = ", ".join(self.targets)
            refuse(context, (*OF_A_TEACHER, "recipe"), f"is for --targets online; the store {named} has its own")
            refuse(
                context,
                OF_THE_VIEWS,
                f"is for --targets online or momentum; the store {named} has targets of its own views, cache again with it "
                "(local crops have no targets: --num-local, --local-scale, --local-size are free)",
            )
        else:
            refuse(
                context,
                ("cache_in_memory", "window_mib"),
                f"is for a store of targets, and these are made on the spot (--targets {self.kind})",
            )

    def config(
        self, overrides: RecipeOverrides, preferred: Recipe | None, load_teacher: LoadTeacher, device: str
    ) -> TargetsConfig:
        """``preferred``: a preset's recipe, of which a store takes the local crops."""
        from ...common.run import pick_device
        from ..targets.cached import Cached
        from ..targets.ensemble import Ensemble
        from ..targets.momentum import Momentum
        from ..targets.online import Online
        from ..targets.with_copy import WithCopy

        if self.kind == "momentum":
            return Momentum(
                get_recipe(self.recipe or USUAL_ALONE, overrides),
                self.prototypes,
                self.copy_momentum,
                self.warmup_teacher_temp_epochs,
                self.split_batchnorm,
            )
        filling: TargetsConfig
        if self.kind == "online":
            assert self.teacher is not None, "refuse_what_does_not_fit asks for it"
            teacher = load_teacher(self.teacher, self.checkpoint).to(pick_device(device))
            filling = Online(teacher, get_recipe(self.recipe or USUAL_RECIPE, overrides), self.views, self.view_size)
        else:
            window = max(1, self.window_mib / len(self.targets))
            stores = tuple(
                Cached(Path(store), window, self.cache_in_memory, preferred, overrides.local_scale)
                for store in self.targets
            )
            filling = stores[0] if len(stores) == 1 else Ensemble(stores, self.targets_weight)
        return WithCopy(filling, self.copy_momentum, self.split_batchnorm) if self.with_copy else filling
