"""The plot of ``rob compare``: what runs score, against what they cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

MARKERS = "osD^vP*X"
ROOM = 2.5
"""Times beyond the dearest run, and below the cheapest, that an axis goes: two of 1, 2, 5, 10 ... are on it, without which
matplotlib would put numbers side by side until they cover each other."""


def compare_plot(
    runs: Sequence[str], costs: Mapping[str, Sequence[float | None]], scores: Mapping[str, Sequence[float | None]]
) -> Figure:
    """A panel a cost that some run has, with a point a run and task. Runs have numbers, and are named below: names beside points
    cover each other.
    """
    costs = {name: values for name, values in costs.items() if any(value is not None for value in values)}
    figure = Figure((max(6.4, 3.1 * len(costs)), 4.4 + 0.2 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for panel, (cost, values) in zip(panels, costs.items(), strict=True):
        for n, (task, found) in enumerate(scores.items()):
            points = [(x, y) for x, y in zip(values, found, strict=True) if x is not None and y is not None]
            hollow = {"markerfacecolor": "white"} if is_control(task, scores) else {}
            if points:
                costing, scoring = zip(*points, strict=True)
                panel.plot(costing, scoring, MARKERS[n % len(MARKERS)], color=f"C{n % 10}", label=task, **hollow)
        for x, (top, numbers) in numbered(values, list(scores.values())).items():
            panel.annotate(
                ", ".join(map(str, numbers)), (x, top), (0, 6), textcoords="offset points", ha="center", fontsize=9
            )
        known = [value for value in values if value is not None]
        panel.set_xscale("log")
        panel.set_xlim(min(known) / ROOM, max(known) * ROOM)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(y=0.15)
        panel.set_xlabel(cost)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("%")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6), frameon=False)
    numbers = [Line2D([], [], linestyle="none") for _ in runs]
    named = [f"{n}  {run}" for n, run in enumerate(runs, 1)]
    figure.legend(numbers, named, loc="outside lower left", frameon=False, handlelength=0, handletextpad=0)
    return figure


def is_control(task: str, tasks: Mapping[str, object]) -> bool:
    """Whether ``task`` is a control: the same measurement of something other than the student, as knn-random is of knn."""
    return any(task != other and task.startswith(f"{other}-") for other in tasks)


def numbered(
    values: Sequence[float | None], scores: Sequence[Sequence[float | None]]
) -> dict[float, tuple[float, list[int]]]:
    """Cost -> the highest score there, and the numbers of the runs from 1 on: runs of one student stand at one place."""
    found: dict[float, tuple[float, list[int]]] = defaultdict(lambda: (0.0, []))
    for n, value in enumerate(values):
        mine = [score for task in scores if (score := task[n]) is not None]
        if value is None or not mine:
            continue
        at = next((x for x in found if 0.95 < x / value < 1.05), value)
        top, numbers = found[at]
        found[at] = max(top, *mine), [*numbers, n + 1]
    return dict(found)
