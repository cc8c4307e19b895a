"""Each network's images on a plane."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from .page import COLOURS, SYMBOLS, label, plot, tag
from .run import Run
from .shown_images import Images

MOST_CLASSES = len(COLOURS)


def maps(runs: Sequence[Run], images: Images) -> Markup:
    """The first two principal components, a plot a network, coloured by class where that is known."""
    import plotly.graph_objects as go

    classes = [images.class_of(row) for row in range(len(images.ids))]
    shown = [name for name, _ in Counter(name for name in classes if name).most_common(MOST_CLASSES)]
    groups = {name: [row for row, one in enumerate(classes) if one == name] for name in sorted(shown)}
    others = [row for row, one in enumerate(classes) if one not in groups]
    if others:
        groups["other" if shown else "image"] = others
    parts = []
    networks = [(f"student {name}", rows) for name, rows in images.features.items()]
    networks += [(f"teacher {name}", rows) for name, rows in images.teachers.items()]
    for network, features in networks:
        places, explained = principal(F.normalize(features, dim=1))
        traces = [
            go.Scatter(
                x=[round(x, 4) for x in places[rows, 0].tolist()],
                y=[round(y, 4) for y in places[rows, 1].tolist()],
                name=label(name),
                text=[label(images.path_of(row)) for row in rows],
                mode="markers",
                marker={
                    "color": COLOURS[number % len(COLOURS)] if number < len(shown) else "#808080",
                    "symbol": SYMBOLS[number % len(SYMBOLS)],
                    "size": 6,
                    "opacity": 0.75,
                },
            )
            for number, (name, rows) in enumerate(groups.items())
        ]
        told = (
            f"{len(features):,} images; the two directions hold {100 * explained[0]:.0f} and {100 * explained[1]:.0f} % of the "
            "variance. Classes that lie apart here are apart; classes that overlap here may still be apart in other directions."
        )
        axes = {"showticklabels": False, "zeroline": False}
        titles = ("first component", "second component")
        parts.append(
            plot(
                *(network, traces, *titles, told, 460),
                xaxis={**axes, "title": {"text": titles[0]}},
                yaxis={**axes, "title": {"text": titles[1]}},
                showlegend=len(groups) > 1,
            )
        )
    return tag("div", *parts, class_="plots")


def principal(rows: Tensor) -> tuple[Tensor, list[float]]:
    """Rows (n, D) on their first two principal components, (n, 2), and the shares of the variance that these hold. The sign of
    a component is such that its largest loading is positive, so that the same features give the same map."""
    centred = (rows - rows.mean(0)).double()
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    largest = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    places = torch.zeros(len(rows), 2, dtype=torch.double)
    places[:, : len(directions)] = centred @ directions.T
    shares = values.square() / values.square().sum().clamp_min(1e-30)
    return places.float(), [float(share) for share in [*shares[:2], 0.0, 0.0][:2]]
