"""``--extend``: what is not given of a run is as its parent has it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ...common.errors import MisuseError
from ...common.factories import is_factory
from ...common.settings import described
from ..config import ObjectiveConfig, OptimiserConfig, PairingChoice
from ..student_config import StudentConfig
from ..train_config import TrainConfig

OF_THE_RUN = ("local_size", "clip_grad", "clip_each", "accumulate", "average", "sync_batchnorm")
ANEW = ("warmup_epochs", "init", "init_prefix", "features", "mean", "std")
"""What is the new run's own, or taken otherwise."""


def as_parent(
    typed: Collection[str],
    student: StudentConfig,
    objective: str | None,
    matched: "partial[ObjectiveConfig]",
    choice: PairingChoice,
    config: "partial[TrainConfig]",
) -> tuple[StudentConfig, str | None, "partial[ObjectiveConfig]", PairingChoice, "partial[TrainConfig]"]:
    """The same with what is not among ``typed``, the options that were given, as the run in ``student.init`` has it.

    MisuseError: there is no such run, or one whose student is of somebody's own code and is not named.
    """
    from ..begun import read_begun
    from ..extension import settings_of_parent

    begun = read_begun(config.keywords["out"])  # which has its parent's settings, and needs the parent no more
    settings = begun or settings_of_parent(student.init, config.keywords["extend"])
    told = settings.get("student")
    if isinstance(told, dict) and "student" not in typed and is_factory(str(told.get("name"))):
        raise MisuseError(
            f"`extend`: the student of {student.init} is {told['name']}, of somebody's own code: give it as `student`"
        )
    try:
        features = {} if "student_features" in typed else {"features": (told or {}).get("features")}
        student = replace(student, **_open(StudentConfig, told, typed), **features)
        matched = partial(
            matched.func, **{**matched.keywords, **_open(ObjectiveConfig, settings.get("objective"), typed)}
        )
        views = _open(PairingChoice, settings.get("pairing"), typed)
        if (views.get("pairing") or choice.pairing) != "cross":
            views.pop("fresh", None)  # which means nothing there
        choice = replace(choice, **views)
        optimiser = replace(config.keywords["optimiser"], **_open(OptimiserConfig, settings.get("optimiser"), typed))
        run = {name: settings[name] for name in OF_THE_RUN if name in settings and name not in typed}
        if "freeze_prototypes" not in typed:
            run["freeze_prototypes"] = 0  # they have learned
        config = partial(config.func, **{**config.keywords, **run, "optimiser": optimiser})
    except (KeyError, TypeError, AttributeError) as error:
        raise MisuseError(
            f"`extend`: {student.init}/config.json is not what rob train-student writes ({error})"
        ) from error
    return student, objective or settings["objective"]["name"], matched, choice, config


def _open(kind: type, told: Mapping[str, Any] | None, typed: Collection[str]) -> dict[str, Any]:
    """The parent's values of the settings that were not given."""
    values = {one.field: (told or {}).get(one.field) for one in described(kind) if one.name not in typed}
    return {name: value for name, value in values.items() if value is not None and name not in ANEW}
