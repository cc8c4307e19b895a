"""The page that a contact sheet is drawn on: tiles, boxes and lines of text at their places in inches."""

from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from ..errors import printable
from ..images.beton import Beton
from ..views.drawing import CROP_HEIGHT, CROP_WIDTH, LEFT, LOCAL, TOP, view_parameters
from ..views.recipes import Recipe

DPI = 100
PAGE = 11.0
"""Inches that blocks of tiles stand side by side in: beside a chart they fit a screen of 1920 x 1080 pixels."""
MARGIN, GAP, LINE = 0.18, 0.07, 0.17
"""Inches: around the sheet, between tiles, and a line of small text."""
TILE, IMAGE = 0.9, 1.9
"""Inches: sides of a view, and of the image it is taken from."""
SMALL, BADGE = 8, 7
"""Points: of text, and of the numbers on boxes and tiles."""
GLOBAL_COLOURS = ("#d98c00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
LOCAL_COLOURS = (
    *("#e41a1c", "#377eb8", "#3d9a3a", "#984ea3", "#e06c00", "#8a8a10", "#a65628", "#e0559f", "#0f9fae", "#666666"),
)
INK, FAINT, SAME_CLASS = "#1a1a1a", "#5e5e5e", "#00785a"


class Sheet:
    """A page of tiles placed in inches from the top left corner of what is below its title."""

    def __init__(self, width: float, height: float, title: str, subtitle: str) -> None:
        titles, subtitles = wrap(title, int(width / 0.11)), wrap(subtitle, int(width / 0.066))  # inches a letter
        below_titles = MARGIN + 0.2 * len(titles) + 0.03
        self.head = below_titles + LINE * len(subtitles) + 0.07
        self.width, self.height = width + 2 * MARGIN, self.head + height + MARGIN
        self.figure = Figure((self.width, self.height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        for n, line in enumerate(titles):
            self._write(MARGIN, MARGIN + 0.2 * n, line, 11, INK, "bold")
        for n, line in enumerate(subtitles):
            self._write(MARGIN, below_titles + LINE * n, line, SMALL, FAINT)

    def text(self, left: float, top: float, text: str, colour: str = INK) -> None:
        self._write(MARGIN + left, self.head + top, text, SMALL, colour)

    def _write(self, left: float, top: float, text: str, points: int, colour: str, weight: str = "normal") -> None:
        x, y = left / self.width, 1 - (top + 0.035) / self.height
        self.figure.text(
            x, y, printable(text), size=points, color=colour, weight=weight, ha="left", va="top", parse_math=False
        )

    def chart(self, left: float, top: float, width: float, height: float) -> Axes:
        """Empty axes at these inches."""
        bottom = self.head + top + height
        return self.figure.add_axes(
            ((MARGIN + left) / self.width, 1 - bottom / self.height, width / self.width, height / self.height)
        )

    def tile(
        self,
        left: float,
        top: float,
        side: float,
        pixels: np.ndarray,
        frame: str | None = None,
        badge: str | None = None,
    ) -> Axes:
        """``pixels`` (H, W, 3) uint8 with ``side`` inches for the longer side; returns the axes, in pixels."""
        height, width = pixels.shape[:2]
        tall, wide = side * height / max(height, width), side * width / max(height, width)
        bottom = self.head + top + tall
        box = ((MARGIN + left) / self.width, 1 - bottom / self.height, wide / self.width, tall / self.height)
        axes = self.figure.add_axes(box, xticks=[], yticks=[])
        size = round(wide * DPI), round(tall * DPI)
        axes.imshow(_resized(pixels, size), extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
        for spine in axes.spines.values():
            spine.set(visible=frame is not None, color=frame, linewidth=2)
        if frame is not None and badge is not None:
            _badge(axes, 0, 0, badge, frame, "left", "top")
        return axes

    def image(
        self,
        left: float,
        top: float,
        data: Beton,
        image_id: int,
        recipe: Recipe,
        seed: int,
        view_ids: tuple[int, ...],
        caption: str,
    ) -> None:
        """The stored image with the numbered boxes that its views are cropped from, and ``caption`` below it."""
        pixels = data.image(image_id)
        axes = self.tile(left, top, IMAGE, pixels)
        n, (height, width) = len(view_ids), pixels.shape[:2]
        heights, widths = np.full(n, height), np.full(n, width)
        crops = view_parameters(recipe, seed, np.full(n, image_id), np.array(view_ids), heights, widths).geometry
        columns = (LEFT, TOP, CROP_WIDTH, CROP_HEIGHT)
        for number, (view_id, (x, y, wide, tall)) in enumerate(zip(view_ids, crops[:, columns].tolist(), strict=True)):
            line, colour = 1.2 if view_id >= LOCAL else 1.8, colour_of(view_id)
            halo = [withStroke(linewidth=line + 0.8, foreground="white")]
            axes.add_patch(
                Rectangle((x, y), wide, tall, fill=False, edgecolor=colour, linewidth=line, path_effects=halo)
            )
            right, low = number % 4 in (1, 2), number % 4 in (2, 3)  # corners in turn, or numbers cover each other
            place = x + wide * right, y + tall * low
            _badge(axes, *place, number_of(view_id), colour, "right" if right else "left", "bottom" if low else "top")
        self.text(left, top + IMAGE * height / max(height, width), caption, FAINT)


def _badge(axes: Axes, x: float, y: float, text: str, colour: str, across: str, along: str) -> None:
    """White on ``colour``, in the corner (x, y)."""
    box = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
    axes.text(x, y, text, size=BADGE, color="white", weight="bold", ha=across, va=along, bbox=box, zorder=5)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """To (width, height). Much enlarged pixels stay squares, which tells a small image from a blurred one."""
    image = Image.fromarray(pixels)
    factor = size[0] // image.width
    if factor >= 4:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.LANCZOS)


def colour_of(view_id: int) -> str:
    """Of a view's box and frame."""
    colours = LOCAL_COLOURS if view_id >= LOCAL else GLOBAL_COLOURS
    return colours[view_id % LOCAL % len(colours)]


def number_of(view_id: int) -> str:
    """As it is written on a view's box and frame, from 1 on."""
    return str(view_id % LOCAL + 1)


def class_of(data: Beton, image_id: int) -> str | None:
    """In words; None: it has none."""
    name = data.class_of(image_id)
    return f"class {name}" if name and name.isdigit() else name
