"""The course of training: losses, waiting, entropies, k-NN."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from ..collapse import FIELDS
from .page import COLOURS, DASHES, code, label, missing, plot, style, tag
from .run import Run

NAMES = {
    "target_entropy": "of a single target (low: sharp)",
    "mean_target_entropy": "of the mean target (high: all prototypes used)",
    "target_std": "spread of the embeddings over a batch",
}


def curves(runs: Sequence[Run]) -> Markup:
    logged = [run for run in runs if run.log]
    if not logged:
        return missing(
            "There is no log yet: rob train-student writes metrics.jsonl every", code("--log-every"), "steps."
        )
    parts = []
    for objective in dict.fromkeys(run.objective for run in logged):
        same = [run for run in logged if run.objective == objective]
        told = "It should fall, fast at first; a flat line from the start wants another rate, a jump a longer warm-up."
        parts.append(_lines(runs, same, f"Loss, {objective}", "loss", lambda line: line["loss"], told))
    parts.append(
        _lines(
            runs,
            logged,
            "Waiting for data",
            "% of a step",
            lambda line: 100 * line["data_wait"],
            "The share of the time in which the student waited for images. Near 0 the loader keeps up; far above 10, more "
            "--workers, smaller stored images, or the GPU loader help.",
            yaxis={"rangemode": "tozero", "title": {"text": "% of a step"}},
        )
    )
    parts.append(
        _lines(
            runs,
            logged,
            "Speed",
            "images/s",
            lambda line: line["images_per_second"],
            "Images of the training set a second, each with all its views. A dip is another program on the machine.",
            yaxis={"rangemode": "tozero", "title": {"text": "images/s"}},
        )
    )
    parts += _entropies(runs, logged)
    return Markup("\n").join([tag("div", *parts, class_="plots"), _without_entropies(logged)])


def _lines(
    runs: Sequence[Run],
    shown: Sequence[Run],
    title: str,
    unit: str,
    of: Callable[[Any], float],
    told: str,
    **layout: Any,
) -> Markup:
    import plotly.graph_objects as go

    traces = [
        go.Scatter(
            x=[line["step"] for line in run.log],
            y=[of(line) for line in run.log],
            name=label(run.name),
            mode="lines" if len(run.log) > 1 else "markers",
            line=style(runs.index(run))["line"],
            marker=style(runs.index(run))["marker"],
        )
        for run in shown
    ]
    return plot(title, traces, "step", unit, told, showlegend=True, **layout)


def _entropies(runs: Sequence[Run], logged: Sequence[Run]) -> list[Markup]:
    import plotly.graph_objects as go

    found = []
    for names, title, unit in (
        (FIELDS[:2], "Entropy of the targets", "nats"),
        (FIELDS[2:], "Spread of the target embeddings", "deviation"),
    ):
        traces = []
        for run in logged:
            for number, name in enumerate(names):
                points = [(line["step"], line[name]) for line in run.log if name in line]  # type: ignore[literal-required]
                if points:
                    steps, values = zip(*points, strict=True)
                    line = {"color": COLOURS[runs.index(run) % len(COLOURS)], "dash": DASHES[number], "width": 2}
                    named = label(f"{run.name}: {NAMES[name]}" if len(names) > 1 else run.name)
                    traces.append(go.Scatter(x=steps, y=values, name=named, mode="lines", line=line))
        if traces:
            told = (
                "The targets tell images apart while the mean target's entropy stays well above a single one's. The first "
                "near 0, or both at the logarithm of the number of prototypes: they collapse."
                if len(names) > 1
                else "How much the embeddings differ between the images of a batch. Near 0 the targets collapse."
            )
            found.append(plot(title, traces, "step", unit, told, height=360, showlegend=True))
    return found


def _without_entropies(logged: Sequence[Run]) -> Markup:
    without = [run.name for run in logged if not any(name in line for line in run.log for name in FIELDS)]
    if not without:
        return Markup()
    return missing(
        f"{', '.join(without)}: no entropies were logged. They are of targets over prototypes and of those that a copy of the "
        "student makes; a store of the largest logits (--encoding topk) has none, since its frozen targets cannot collapse."
    )


def over_time(runs: Sequence[Run]) -> Markup:
    """k-NN of the student in the course of the run, between its floor and its teacher."""
    import plotly.graph_objects as go

    shown = [run for run in runs if run.measured]
    parts = []
    kinds = {
        "k-NN top-1": (True, False),
        "neighbours shared with the teacher": (False, False),
        "effective rank (RankMe)": (False, True),
    }
    for what, kind in kinds.items():
        unit = "" if kind[1] else "%"
        some = [run for run in shown if (run.measured[-1].outcome.by_labels, run.measured[-1].outcome.by_rank) == kind]
        if not some:
            continue
        traces: list[Any] = []
        for run in some:
            points = [(0, run.measured[0].outcome.before), *((m.epoch, m.outcome.student) for m in run.measured)]
            epochs, scores = zip(*points, strict=True)
            traces.append(
                go.Scatter(x=epochs, y=scores, name=label(run.name), mode="lines+markers", **style(runs.index(run)))
            )
        outcome, last = some[0].measured[-1].outcome, max(run.measured[-1].epoch for run in some)
        for name, value, dash in (("teacher", outcome.teacher, "dashdot"), ("pixels", outcome.pixels, "dot")):
            if value is not None:
                line = {"color": "#808080", "dash": dash, "width": 2}
                traces.append(go.Scatter(x=[0, last], y=[value, value], name=name, mode="lines", line=line))
        told = (
            "Each run begins at its start (epoch 0). It should leave it and climb towards the teacher; below the "
            "pixels' line it has learned nothing yet that pixels do not say."
        )
        parts.append(
            plot(f"{what} in the course of training", traces, "epoch", unit, told, height=360, showlegend=True)
        )
    without = [run.name for run in runs if not run.measured]
    if without:
        parts.append(
            missing(
                f"{', '.join(without)}: not measured in the course of the run.",
                code("rob train-student ... --knn-every 1"),
                "does.",
            )
        )
    return Markup("\n").join(parts)
