"""A run that goes on does so as it was planned, however fast the machine is now."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.records import read_record
from ..common.views.config import LoaderConfig
from .config import PairingChoice
from .train_config import LoaderByPlan, TrainConfig


def read_begun(out: Path) -> dict[str, Any] | None:
    """The settings of the run whose checkpoint is in ``out``; None: there is none. FailureError: they are damaged.

    Those of a rob from before checksums pass: the checkpoint holds them too, has one, and takes no others.
    """
    if not (out / "checkpoint.pt").exists() or not (out / "config.json").exists():
        return None
    return read_record(
        out / "config.json",
        dict[str, Any],
        "delete it, and give the settings that the run was begun with",
        unchecked=True,
    )


def begun_objective(begun: dict[str, Any] | None) -> str | None:
    """The name of its objective, where there is a run that has one."""
    objective = (begun or {}).get("objective")
    return objective.get("name") if isinstance(objective, dict) else None


def with_teacher(branch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of the ``branch`` in a run's settings, what is said of each teacher; nothing where it had none, or does not say."""
    return [one for one in (branch, *branch.get("others", ())) if one.get("teacher")]


def as_begun(config: TrainConfig, begun: dict[str, Any]) -> TrainConfig:
    """``config`` with what it leaves open as the run in its folder has it."""
    student, optimiser, loader, pairing = config.student, config.optimiser, config.loader, config.pairing
    try:
        if student.small_images is None:
            student = replace(student, small_images=begun["student"]["small_images"])
        conv_stem = begun["student"].get("conv_stem") if student.conv_stem is None else student.conv_stem
        student = replace(student, conv_stem=conv_stem or None)  # a run without says nothing of it
        objective = config.objective
        if objective is not None and objective.head_norm is None:
            objective = replace(objective, head_norm=begun["objective"].get("head_norm"))
        if optimiser.lr is None:
            optimiser = replace(optimiser, lr=begun["optimiser"]["lr"])
        if optimiser.warmup_epochs is None and config.epochs is None:
            optimiser = replace(optimiser, warmup_epochs=begun["optimiser"]["warmup_epochs"])
        if isinstance(loader, LoaderByPlan):
            loader = LoaderConfig(loader.backend, begun["loader"]["batch_size"], loader.workers)
        if pairing is None or isinstance(pairing, PairingChoice):
            pairing = pairing or PairingChoice()
            open_views = [name for name in ("num_local", "step_targets") if getattr(pairing, name) is None]
            pairing = replace(pairing, **{name: begun["pairing"][name] for name in open_views})
        epochs = config.epochs or begun["epochs"]
    except (KeyError, TypeError):  # not what a run writes: the checkpoint will say so
        return config
    return replace(
        config,
        student=student,
        objective=objective,
        optimiser=optimiser,
        loader=loader,
        pairing=pairing,
        epochs=epochs,
        effort=None,
        budget=None,
    )
