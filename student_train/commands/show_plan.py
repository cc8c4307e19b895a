"""The plan of a run, printed before it, and whether it worked, after it."""

from typing import TYPE_CHECKING, Any

from ...common.screen import facts, say, show_table

if TYPE_CHECKING:
    from ..evaluate.yardstick import Outcome
    from ..plan import TrainPlan


def show_plan(plan: "TrainPlan") -> None:
    """What will be done, what was chosen for it and why, and what to think of first."""
    rows = [
        ("images", f"{plan.num_images:,}, {plan.config.loader.batch_size} in a step"),
        ("views of an image a step", plan.views),
        ("steps", f"{plan.steps:,} in {plan.config.epochs:,} epoch{'s' * (plan.config.epochs != 1)}"),
    ]
    if plan.trial and plan.seconds is not None:
        rows += [
            ("a step, measured", f"{plan.trial.seconds:.2f} s"),
            ("in all", f"about {in_words(plan.seconds)}"),
            ("memory", f"about {plan.trial.memory_bytes / 1e9:.1f} GB" + _free(plan.free_bytes)),
        ]
    facts("plan", rows)
    if plan.choices:
        chosen = [
            (f"--{choice.setting.replace('_', '-')}", _text(choice.value), choice.reason) for choice in plan.choices
        ]
        facts("chosen, unless you give it", chosen)
    for warning in plan.warnings:
        say(f"warning: {warning}.")


def show_outcome(outcome: "Outcome", said: list[str]) -> None:
    """The student beside its random start, and what to think of it, which is loud where it did not work."""
    rows = [("pixels", outcome.pixels)]
    if outcome.start is None:
        rows += [("random start", outcome.random)]
    else:
        rows += [("random weights", outcome.random), ("what it began with", outcome.start)]
    rows += [("student", outcome.student)]
    rows += [("teacher, its cached views", outcome.teacher)] if outcome.teacher is not None else []
    show_table(outcome.title, ("features", "%"), rows, named=True)
    for sentence in said:
        say(f"WARNING: {sentence}.")


def in_words(seconds: float) -> str:
    """``4 minutes``."""
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _free(free: int | None) -> str:
    return f" of {free / 1e9:.1f} GB that are free" if free else ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
