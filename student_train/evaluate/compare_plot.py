"""The plot of ``rob compare``: what runs score, against what they cost."""

from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

MARKERS = "osD^vP*X"
ROOM = 2.5
"""Times beyond the dearest run, and below the cheapest, that an axis goes: two of 1, 2, 5, 10 ... are on it, without which
matplotlib would put numbers side by side until they cover each other."""
CLOSE = 0.03
"""Of the range of scores: nearer points share their numbers."""


def compare_plot(
    runs: Sequence[str], costs: Mapping[str, Sequence[float | None]], scores: Mapping[str, Sequence[float | None]]
) -> Figure:
    """A panel a cost that some run has, with a point a run and task. Runs have numbers, beside their first task's point, and are
    named below: names beside points cover each other.
    """
    costs = {name: values for name, values in costs.items() if any(value is not None for value in values)}
    figure = Figure((max(6.4, 3.1 * len(costs)), 4.4 + 0.2 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    main = [
        next((score for score in of_run if score is not None), None) for of_run in zip(*scores.values(), strict=True)
    ]
    every = [score for found in scores.values() for score in found if score is not None]
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for panel, (cost, values) in zip(panels, costs.items(), strict=True):
        for n, (task, found) in enumerate(scores.items()):
            points = [(x, y) for x, y in zip(values, found, strict=True) if x is not None and y is not None]
            hollow = {"markerfacecolor": "white"} if is_control(task, scores) else {}
            if points:
                costing, scoring = zip(*points, strict=True)
                panel.plot(costing, scoring, MARKERS[n % len(MARKERS)], color=f"C{n % 10}", label=task, **hollow)
        for x, y, numbers in numbered(values, main, CLOSE * (max(every) - min(every))):
            text = ", ".join(map(str, numbers))
            panel.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
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
    costs: Sequence[float | None], scores: Sequence[float | None], close: float
) -> list[tuple[float, float, list[int]]]:
    """Cost and score of a place, and the numbers of the runs there, from 1 on: runs whose scores are ``close`` share one, since
    their numbers would cover each other."""
    places: list[tuple[float, float, list[int]]] = []
    for number, (x, y) in enumerate(zip(costs, scores, strict=True), 1):
        if x is None or y is None:
            continue
        for there_x, there_y, numbers in places:
            if 0.95 < there_x / x < 1.05 and abs(there_y - y) <= close:
                numbers.append(number)
                break
        else:
            places.append((x, y, [number]))
    return places
