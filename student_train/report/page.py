"""The page: HTML in which every text is escaped, plots, pictures, and one file that needs no network.

``Markup`` (markupsafe) is text that is HTML already; all else is escaped where it meets one. A content security policy forbids
the page to fetch anything, whatever is in it.
"""

import base64
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from ...common.errors import printable
from .style import POLICY, SCRIPT, STYLE

COLOURS = ("#2f83c9", "#d9730d", "#1d9a6c", "#c0569c", "#d1495b", "#8673d6", "#93801c", "#808080", "#14a0b0", "#a2683f")
"""Of medium lightness: they are seen on white and on black."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "hexagon", "bowtie")
MARGINS = {"l": 56, "r": 12, "t": 34, "b": 46}


def text(value: Any) -> Markup:
    """A value, escaped; what no terminal would print is spelled out."""
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def join(parts: Iterable[Any]) -> Markup:
    return Markup("\n").join(map(text, parts))


def tag(name: str, *children: Any, **attributes: str) -> Markup:
    """``tag("td", 3, class_="number")`` -> ``<td class="number">3</td>``."""
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{named}>{join(children)}</{name}>")


def code(*words: Any) -> Markup:
    """A command, to be copied."""
    return tag("code", " ".join(map(str, words)))


def missing(*parts: Any) -> Markup:
    """What is said where there is nothing to show."""
    return tag("p", Markup(" ").join(map(text, parts)), class_="missing")


def caption(*parts: Any) -> Markup:
    return tag("p", Markup(" ").join(map(text, parts)), class_="caption")


def section(anchor: str, title: str, *children: Any) -> Markup:
    return tag("section", tag("h2", title), *children, id=anchor)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Markup:
    """A cell that is a number stands on the right; None is a dash."""
    body = [tag("tr", tag("th", row[0], scope="row"), *map(_cell, row[1:])) for row in rows]
    titles = tag("tr", *(tag("th", title, scope="col") for title in head))
    return tag("div", tag("table", tag("thead", titles), tag("tbody", *body)), class_="wide")


def _cell(value: Any) -> Markup:
    if value is None:
        return tag("td", "–", class_="number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return tag("td", value)
    return tag("td", f"{value:,}" if isinstance(value, int) else f"{value:,.2f}", class_="number")


def details(summary: Any, *children: Any) -> Markup:
    return tag("details", tag("summary", summary), *children)


# ==== plots ====


def style(number: int) -> dict[str, Any]:
    """Colour, dash and marker of the ``number``-th thing in a plot: each of them tells it apart from the others."""
    colour = COLOURS[number % len(COLOURS)]
    return {
        "line": {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
    }


def plot(title: str, traces: Sequence[Any], x: str, y: str, told: Any, height: int = 320, **layout: Any) -> Markup:
    """A figure of plotly's ``traces`` with axes named ``x`` and ``y``; ``told`` is what should be seen in it."""
    import plotly.graph_objects as go

    legend = {"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0}
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="none",
        title={"text": label(title), "font": {"size": 14}, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin=MARGINS,
        legend=legend,
        font={"family": "system-ui, sans-serif", "size": 12},
        xaxis={"title": {"text": x, "standoff": 6}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": y, "standoff": 6}, "automargin": True, "zeroline": False},
        hovermode="closest",
        height=height,
    )
    figure.update_layout(**layout)
    return drawn(figure, title, told, height)


def drawn(figure: Any, title: str, told: Any, height: int) -> Markup:
    """A plotly figure, to be drawn when the page is opened."""
    drawing = Markup(figure.to_json().replace("<", "\\u003c"))  # a name may hold </script>
    return tag(
        "figure",
        tag(
            "div",
            tag("script", drawing, type="application/json"),
            class_="plot",
            role="img",
            aria_label=title,
            style=f"height:{height}px",
        ),
        tag("figcaption", told),
    )


def label(value: Any) -> str:
    """A name as plotly takes it, which reads some tags in its texts."""
    return str(text(value))


# ==== pictures ====


def picture(pixels: np.ndarray, told: str = "", side: int = 96, enlarge: bool = True) -> Markup:
    """(H, W, 3) uint8 as a JPEG in the page, of at most ``side`` pixels a side."""
    image = Image.fromarray(pixels)
    small = max(image.size) * 2 <= side
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88 if small else 80, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "small" if small and enlarge else "usual"
    shown = printable(told)
    return Markup('<img class="{}" alt="{}" title="{}" src="data:image/jpeg;base64,{}">').format(
        kind, shown, shown, data
    )


def tile(pixels: np.ndarray, under: Any = "", told: str = "", mark: str = "", over: Any = "") -> Markup:
    """A picture with a line below it; ``mark`` is a class of the style sheet, ``over`` lies on the picture."""
    return tag(
        "span", tag("span", picture(pixels, told), over, class_="frame"), tag("small", under), class_=f"tile {mark}"
    )


def tiles(*children: Any) -> Markup:
    return tag("div", *children, class_="tiles")


# ==== the file ====


def document(title: str, lead: Any, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """The whole file; ``sections`` are anchor, title and content."""
    from plotly.offline import get_plotlyjs

    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections]
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    head = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>{}</title>\n<style>{}</style>\n</head>\n'
    ).format(POLICY, title, Markup(STYLE))
    body = tag(
        "body",
        tag("header", tag("h1", title), lead, tag("nav", *links)),
        tag("main", *(section(anchor, name, content) for anchor, name, content in sections)),
        tag("noscript", tag("p", "The plots need JavaScript; all else is here.", class_="missing")),
        tag("script", Markup(packed), type="application/gzip", id="plotly"),
        tag("script", Markup(SCRIPT)),
    )
    return str(head + body + Markup("\n</html>\n"))


def plain(value: Any) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
