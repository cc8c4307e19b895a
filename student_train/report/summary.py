"""At the top: each run in a line, and what it came to."""

from collections.abc import Sequence

from markupsafe import Markup

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
    head = ("run", "student", "objective", "steps", "loss", "student %", "random %", "pixels %", "teacher %")
    shown = [table(head, rows)]
    measured = [run.outcome for run in runs if run.outcome]
    if measured:
        first = measured[0]
        what = "k-NN top-1 with a fifth of each class held out" if first.by_labels else (
            "the share of an image's ten nearest that are the teacher's too"
        )  # fmt: skip
        shown.append(
            caption(
                f"The percentages are {what}, of {first.num_images:,} of the training images, measured at the run's end: of the "
                "student, of the same network with random weights, of raw pixels, and of the teacher. A run worked where its "
                "student is well above random; losses of different objectives are not to be compared."
            )
        )
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
