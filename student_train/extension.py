"""A run that goes on with another one, finished or stopped, under a new schedule: as a run of its own, which names its parent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.errors import MisuseError, first_line
from ..common.files import first_difference
from ..common.weights import hash_weights
from .begun import as_begun, read_begun, with_teacher
from .checkpoint import read_checkpoint
from .students import describe_student
from .train_config import TrainConfig

OWN_START = ("init", "init_prefix", "mean", "std")
"""What a student began with, which is no part of what it is."""


@dataclass(frozen=True)
class Parent:
    """``state`` is that of its checkpoint; ``told`` is what ``config.json`` says of it."""

    run: Path
    state: Mapping[str, Any]
    told: Mapping[str, Any]
    warning: str | None = None
    """Of another teacher than the run has."""


def settings_of_parent(run: str | None, epochs: int | None) -> dict[str, Any]:
    """Those of the run that is extended by ``epochs``. MisuseError: none is named, or it could not go on."""
    if run is None:
        raise MisuseError(f"`extend` {epochs} goes on with another run: give its folder as `init` RUN")
    settings = read_begun(Path(run))
    if settings is None:
        raise MisuseError(f"`extend` {epochs}: {run} has no checkpoint.pt and config.json of a run that could go on")
    return settings


def as_parent(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """``config`` with what it leaves open as the parent has it, for ``config.extend`` epochs.

    MisuseError: it has another student or objective, which the parent's checkpoint is not of.
    """
    config = as_begun(replace(config, epochs=config.extend), settings)
    if config.student.patch_drop is None:
        config = replace(
            config, student=replace(config.student, patch_drop=settings.get("student", {}).get("patch_drop"))
        )
    assert config.objective is not None
    asked = {name: value for name, value in asdict(config.student).items() if value is not None}
    asked = {**(settings.get("student") or {}), **asked}  # what is open of a student is as the parent has it
    moments = {**(settings.get("optimiser") or {}), "name": config.optimiser.name}  # another keeps other moments
    for part, told in (("student", asked), ("objective", asdict(config.objective)), ("optimiser", moments)):
        then = settings.get(part)
        different = first_difference(_without_start(then), _without_start(told)) if isinstance(then, dict) else None
        if different:
            name, was, now = different
            raise MisuseError(
                f"`extend` goes on with {config.student.init}, whose {part} has {name} = {was}, and this run has {now}: take the "
                "same, or leave `extend` out to begin a new run with its weights"
            )
    then, now = settings.get("student_info") or {}, describe_student(config.student)
    if (then.get("output_stride"), then.get("conv_stem")) != (now.output_stride, now.conv_stem):
        raise MisuseError(
            f"`extend` goes on with {config.student.init}, which an earlier rob began with other strides: leave `extend` out to "
            "begin a new run with its weights"
        )
    return config


def _without_start(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in OWN_START}


def read_parent(config: TrainConfig, branch: Mapping[str, Any]) -> Parent:
    """``branch`` describes that of the run. MisuseError: its teachers come in another order; and, as FailureError, as
    ``read_checkpoint``."""
    run = Path(config.student.init or "")
    warning = _other_teachers(run, _teachers((read_begun(run) or {}).get("branch") or {}), _teachers(branch))
    state = read_checkpoint(run / "checkpoint.pt")["state"]
    try:
        tensors = {
            name: value for name, value in state["model"].items() if isinstance(value, Tensor)
        }  # a queue counts, too
        told = {"run": str(run), "step": int(state["step"]), "weights": hash_weights(tensors)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MisuseError(
            f"{run}/checkpoint.pt is not of rob train-student ({error}): nothing to go on with"
        ) from error
    return Parent(run, state, told, warning)


def _teachers(branch: Mapping[str, Any]) -> list[str]:
    return [f"{one['teacher']} (weights {str(one.get('weights_hash'))[:8]})" for one in with_teacher(branch)]


def _other_teachers(run: Path, then: list[str], now: list[str]) -> str | None:
    if then == now or not then:
        return None
    names = ", ".join(then)
    if sorted(then) == sorted(now):
        raise MisuseError(
            f"`targets`: {run}, which `extend` goes on with, has a head for each of its teachers, in the order {names}: give "
            "the stores in that order"
        )
    return f"{run} learned from {names}, and this run learns from {', '.join(now) or 'no teacher'}"


def take_over(state: Mapping[str, Any], parent: Parent) -> None:
    """Load the parent's checkpoint into ``state``'s objects, but for the rates and decays of its optimiser: the schedule is new.

    MisuseError: it has no such part, or one of another shape.
    """
    for name, part in state.items():
        if name not in parent.state:
            raise MisuseError(
                f"`extend`: {parent.run} has no {name} in its checkpoint, which this run wants: give the settings that it had"
            )
        saved = parent.state[name]
        try:
            if name == "optimiser":
                groups = part.state_dict()["param_groups"]
                if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
                    raise ValueError("its optimiser has other groups of weights")
                saved = {**saved, "param_groups": groups}
            part.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise MisuseError(
                f"`extend`: what {parent.run} has of its {name} does not fit this run ({first_line(error)}): give the settings "
                "that it had, or leave `extend` out to begin a new run with its weights"
            ) from error
