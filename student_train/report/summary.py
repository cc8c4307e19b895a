"""At the top: each run in a line, and what it came to."""

from collections.abc import Sequence

from markupsafe import Markup

from ..evaluate.yardstick import Outcome
from .page import caption, code, missing, table
from .run import Run


def summary(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        last, outcome = (run.log[-1] if run.log else None), run.outcome
        rows.append(
            [
                run.name,
                run.student,
                run.objective,
                last and last["step"],
                last and last["loss"],
                *([outcome.student, outcome.random, outcome.pixels, outcome.teacher] if outcome else [None] * 4),
            ]
        )
    head = ("run", "network", "objective", "steps", "loss", "student", "random", "pixels", "teacher")
    shown = [table(head, rows)]
    measured: dict[tuple[str, int], list[str]] = {}
    for run in runs:
        if run.outcome:
            measured.setdefault((_what(run.outcome), run.outcome.num_images), []).append(run.name)
    for (what, images), names in measured.items():
        whose = f" of {', '.join(names)}" if len(measured) > 1 else ""
        shown.append(
            caption(
                f"The last four columns{whose} are {what}, of {images:,} of the training images, measured at the run's end: "
                "of the student, of the same network with random weights, of raw pixels, and of the teacher. A run worked where "
                "its student is well above random; losses of different objectives are not to be compared."
            )
        )
    if len(measured) > 1:
        shown.append(caption("Runs that were measured differently are not to be compared by these columns."))
    for run in runs:
        if not run.outcome:
            shown.append(
                missing(
                    f"{run.name} was not compared with its random start, which rob train-student does at its end, where there "
                    "are 50 images or more with labels or a store."
                )
            )
        if not run.has_weights:
            shown.append(
                missing(f"{run.name} is not finished: the same", code("rob train-student"), "command goes on with it.")
            )
    return Markup("\n").join(shown)


def _what(outcome: Outcome) -> str:
    if outcome.by_labels:
        return "k-NN top-1 in percent, with a fifth of each class held out"
    if outcome.by_rank:
        return "RankMe, the effective rank of the embeddings"
    return "the share in percent of an image's ten nearest that are the teacher's too"
