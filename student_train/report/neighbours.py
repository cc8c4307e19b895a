"""What students and teachers find alike, side by side."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from .page import caption, code, missing, table, tag, tile, tiles
from .run import Run
from .shown_images import Images, middle

SHOWN = 6


def neighbours(runs: Sequence[Run], images: Images, rows: list[int]) -> Markup:
    """For each of ``rows`` a line a network: its nearest among these images, those of the same class marked."""
    names = [(f"student {name}", rows) for name, rows in images.features.items()]
    names += [(f"teacher {name}", rows) for name, rows in images.teachers.items()]
    count = min(SHOWN, len(images.ids) - 1)
    found = {name: nearest(F.normalize(rows - rows.mean(0), dim=1), count) for name, rows in names}
    labels = images.labels
    parts = [
        caption(
            f"The {count} nearest of {len(images.ids):,} training images by the cosine of features with their mean taken off; "
            "for a teacher those of its cached targets, the mean over an image's views.",
            "A tick and green: of the same class." if labels is not None else "",
            "A student has learned what its teacher had to say when both lines show the same kind of thing.",
        )
    ]
    if labels is not None:
        right = {name: _same_class(places, torch.as_tensor(labels)) for name, (places, _) in found.items()}
        head = ("network", f"of the {count} nearest, same class, %")
        parts.append(table(head, [[name, 100 * share] for name, share in right.items()]))
    for row in rows:
        lines = []
        for name, (places, cosines) in found.items():
            shown = []
            for place, cosine in zip(places[row].tolist(), cosines[row].tolist(), strict=True):
                same = labels is not None and labels[place] == labels[row] >= 0
                under = f"{'✓ ' if same else ''}{images.class_of(place)} {cosine:.2f}".strip()
                pixels = middle(images.data, int(images.ids[place]))
                shown.append(tile(pixels, under, images.path_of(place), "same" if same else ""))
            lines.append(tag("div", tag("p", name, class_="who"), tiles(*shown)))
        asked = tile(middle(images.data, int(images.ids[row])), images.class_of(row), images.path_of(row), "query")
        image = tag("div", tag("p", "image", class_="who"), tiles(asked))
        parts.append(tag("div", image, tag("div", *lines), class_="asked"))
    if not images.teachers:
        parts.append(
            missing(
                "No teacher beside them: its targets are not where the runs say, or they had none. With the store back in its "
                "place,",
                code("rob report"),
                "shows it.",
            )
        )
    return Markup("\n").join(parts)


def nearest(unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places (n, count) and cosines of the nearest other rows of unit vectors (n, D), nearest first."""
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-torch.inf)
    found = cosines.topk(count, dim=1)
    return found.indices, found.values


def _same_class(places: Tensor, labels: Tensor) -> float:
    known = labels >= 0
    return float((labels[places] == labels[:, None])[known].double().mean()) if known.any() else 0.0
