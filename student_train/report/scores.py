"""What the students score, and what the exported files weigh."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..evaluate.compare import headline
from ..evaluate.results import not_comparable, others_left_out
from .page import COLOURS, caption, code, label, missing, plot, style, table
from .run import Run


def evaluations(runs: Sequence[Run]) -> Markup:
    """Every result of ``rob eval``, as bars and as a table."""
    import plotly.graph_objects as go

    scores = {run.name: {n: s for task, r in run.results.items() for n, s in headline(task, r).items()} for run in runs}
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    parts = []
    if tasks:
        traces = [
            go.Bar(
                x=list(map(label, tasks)),
                y=[scores[run.name].get(task) for task in tasks],
                name=label(run.name),
                marker={
                    "color": COLOURS[number % len(COLOURS)],
                    "pattern": {"shape": ("", "/", ".", "x", "-", "\\")[number % 6], "solidity": 0.25},
                },
                texttemplate="%{y:.1f}",
                textposition="outside",
                cliponaxis=False,
            )
            for number, run in enumerate(runs)
            if scores[run.name]
        ]
        told = (
            "Frozen features: top-1 of classification, mean IoU of segmentation, AP of detection, means over subsets with few "
            "labels. Bars begin at 0."
        )
        parts.append(plot("What the features are worth", traces, "", "%", told, showlegend=True, barmode="group"))
        rows = [[task, *(scores[run.name].get(task) for run in runs)] for task in tasks]
        parts.append(table(("task, %", *(run.name for run in runs)), rows))
        parts += [caption(f"{sentence}.") for sentence in not_comparable({run.name: run.results for run in runs})]
    parts += [caption(f"{others_left_out(run.name, run.left_out)}.") for run in runs if run.left_out]
    without = [run for run in runs if not scores[run.name]]
    for run in without:
        parts.append(
            missing(
                f"{run.name} has not been evaluated.",
                code("rob eval knn", run.folder, "TRAIN.beton --test TEST.beton"),
                "does.",
            )
        )
    return Markup("\n").join(parts)


def exports(runs: Sequence[Run]) -> Markup:
    """Size against what is left of accuracy."""
    import plotly.graph_objects as go

    parts, rows = [], []
    for by_labels, unit, title in (
        (True, "k-NN top-1, %", "Size and accuracy of exported files"),
        (False, "nearest neighbour kept, %", "Size and agreement of exported files"),
    ):
        traces = []
        for number, run in enumerate(runs):
            files = [(entry, _score(entry, by_labels)) for entry in run.exports.values()]
            points = [(entry, score) for entry, score in files if score is not None]
            if points:
                points.sort(key=lambda point: point[0].bytes)
                traces.append(
                    go.Scatter(
                        x=[entry.bytes / 1e6 for entry, _ in points],
                        y=[score for _, score in points],
                        text=[label(entry.file.removeprefix("student.")) for entry, _ in points],
                        textposition="top center",
                        name=label(run.name),
                        mode="lines+markers+text",
                        cliponaxis=False,
                        **style(number),
                    )
                )
        if traces:
            told = (
                "Each point is a file, measured in its own runtime. Down and to the left: smaller and worse. An int8 file should "
                "stand far left of its float file and hardly lower."
            )
            sizes = [x for trace in traces for x in trace.x]
            room = {"range": [0, 1.15 * max(sizes)], "title": {"text": "MB"}}
            parts.append(plot(title, traces, "MB", unit, told, showlegend=True, xaxis=room))
    for run in runs:
        for entry in run.exports.values():
            found = entry.agreement
            rows.append(
                [
                    f"{run.name}: {entry.file}",
                    entry.precision,
                    entry.bytes / 1e6,
                    entry.latency_ms,
                    None if found is None else f"{found.mean_cosine:.4f}",
                    None if found is None else 100 * found.neighbours,
                    found and found.knn,
                    found and found.knn_torch,
                ]
            )
    if rows:
        head = (
            "file",
            "numbers",
            "MB",
            "ms, one thread",
            "mean cosine",
            "neighbour kept, %",
            "k-NN, %",
            "k-NN of torch, %",
        )
        parts.append(table(head, rows))
        parts.append(
            caption("k-NN here is among the images the file was checked on; compare it only with torch's column.")
        )
    for run in runs:
        if not run.exports:
            parts.append(
                missing(
                    f"{run.name} has not been exported.",
                    code("rob export", run.folder, "--to onnx --int8 --data DATA.beton"),
                    "does.",
                )
            )
    return Markup("\n").join(parts)


def _score(entry: Any, by_labels: bool) -> float | None:
    found = entry.agreement
    if found is None or (found.knn is not None) is not by_labels:
        return None
    return found.knn if by_labels else 100 * found.neighbours
