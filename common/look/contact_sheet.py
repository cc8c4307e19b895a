"""Contact sheets: images with their views, and what the teacher finds alike, on one PNG to judge by eye.

A ``.beton``'s sheet shows what a recipe does to its images. A target store's shows the very views that the teacher saw, each
with its nearest neighbours by the cached targets: when the neighbours make no sense, no student will learn any.
"""

from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from ..errors import printable
from ..images.beton import Beton
from ..store.reader import TargetStore
from ..views.drawing import CROP_HEIGHT, CROP_WIDTH, LEFT, LOCAL, TOP, view_parameters
from ..views.loader import LoaderConfig, ViewLoader, ViewSet
from ..views.recipes import Recipe, get_recipe
from .config import SheetConfig
from .neighbours import nearest
from .pair_ratios import pair_ratios, weighted_median

DPI = 150
MARGIN, GAP, LINE = 0.18, 0.07, 0.15
"""Inches: around the sheet, between tiles, and a line of small text."""
CHART_WIDTH, CHART_HEIGHT, CHARTS_WIDTH = 2.6, 2.2, 7.0
"""Inches: a chart, with the lines above and below it, and both with the longer line above the second."""
RATIO_IMAGES = 2000
"""Images whose pairs are in the histograms."""
TILE, IMAGE = 1.0, 1.6
"""Inches: sides of a view, and of the image it is taken from."""
GLOBAL_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
LOCAL_COLOURS = (
    "#e41a1c",
    "#377eb8",
    "#4daf4a",
    "#984ea3",
    "#ff7f00",
    "#a6a61d",
    "#a65628",
    "#f781bf",
    "#17becf",
    "#666666",
)
INK, FAINT, SAME_CLASS = "#1a1a1a", "#6e6e6e", "#00785a"


def contact_sheet(config: SheetConfig) -> Path:
    """Draw the sheet as the PNG ``config.out``. Raises MisuseError when the store was not made from the data."""
    data = Beton(config.data)
    image_ids = _choose(data.num_images, config.images, config.spread)
    if config.store is None:
        sheet = _views_sheet(config, data, image_ids)
    else:
        store = TargetStore.open(config.store)
        store.check(data_fingerprint=data.manifest.fingerprint)
        sheet = _neighbours_sheet(config, data, store, image_ids)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(config.out)
    return config.out


def _choose(available: int, count: int, spread: bool) -> np.ndarray:
    count = min(count, available)
    return np.linspace(0, available, count, endpoint=False).astype(np.int64) if spread else np.arange(count)


# ==== the two sheets ====


def _views_sheet(config: SheetConfig, data: Beton, image_ids: np.ndarray) -> "Sheet":
    """A row an image: the image, its global crops, and its local crops in two half-sized rows."""
    recipe = config.recipe
    global_ids, local_ids = tuple(range(recipe.num_global)), tuple(range(LOCAL, LOCAL + recipe.num_local))
    sets = [(recipe.global_crops[0].size, global_ids)]
    if recipe.local_crop and local_ids:
        sets.append((recipe.local_crop.size, local_ids))
    pixels = load_views(data, recipe, config.seed, "auto", image_ids, sets)

    small = (IMAGE - GAP) / 2
    per_row = -(-len(local_ids) // 2)
    locals_at = (1 + len(global_ids)) * (IMAGE + GAP) + GAP
    width = locals_at + per_row * (small + GAP) - GAP if local_ids else locals_at - 2 * GAP
    width = max(width, CHARTS_WIDTH) if config.ratios else width
    row_height = IMAGE + LINE + 2 * GAP
    names = f"{config.data.name}: views of recipe {recipe.name}"
    what = f"seed {config.seed}, rows {_listed(image_ids)} of {data.num_images:,}; a frame has the colour of its crop's box"
    height = len(image_ids) * row_height + LINE
    sheet = Sheet(width, height + (CHART_HEIGHT if config.ratios else 0), names, what)
    if config.ratios:
        _draw_ratios(sheet, height, config, data)
    sheet.text(0, 0, "image")
    sheet.text(IMAGE + GAP, 0, f"global crops, {recipe.global_crops[0].size} px")
    if recipe.local_crop and local_ids:
        sheet.text(locals_at, 0, f"local crops, {recipe.local_crop.size} px")
    for row, image_id in enumerate(image_ids):
        top = LINE + GAP + row * row_height
        sheet.image(0, top, data, image_id, recipe, config.seed, global_ids + local_ids)
        for n, view_id in enumerate(global_ids):
            sheet.tile((1 + n) * (IMAGE + GAP), top, IMAGE, pixels[image_id, view_id], _colour(view_id))
        for n, view_id in enumerate(local_ids):
            left, down = locals_at + n % per_row * (small + GAP), n // per_row * (small + GAP)
            sheet.tile(left, top + down, small, pixels[image_id, view_id], _colour(view_id))
    return sheet


def _draw_ratios(sheet: "Sheet", top: float, config: SheetConfig, data: Beton) -> None:
    """Two histograms over the pairs that meet in the loss, by their share of it, of the recipe (filled) and of ``dino`` as it
    stands (line).
    """
    some = slice(0, RATIO_IMAGES)
    recipes = {config.recipe.name: config.recipe, "dino (as in its table)": get_recipe("dino")}
    found = {
        name: pair_ratios(recipe, config.seed, data.heights[some], data.widths[some])
        for name, recipe in recipes.items()
    }
    titles = ("larger crop's area over the smaller one's", "how much larger things appear in one of the views")
    for n, (field_name, title) in enumerate(zip(("area", "magnification"), titles, strict=True)):
        left = n * (CHART_WIDTH + 3 * MARGIN) + MARGIN
        axes = sheet.chart(left, top + LINE + GAP, CHART_WIDTH, CHART_HEIGHT - 0.75)
        shown = {name: np.log2(getattr(ratios, field_name)) for name, ratios in found.items()}
        bins = np.linspace(0, max([1.0, *(values.max() for values in shown.values() if values.size)]), 40).tolist()
        for name, values in shown.items():
            if not values.size:
                continue
            weight = found[name].weight
            label = f"{name}: median {2 ** weighted_median(values, weight):.1f}"
            if name == config.recipe.name:
                axes.hist(values, bins, density=True, weights=weight, label=label, color="#89c2d9")
            else:
                axes.hist(values, bins, density=True, weights=weight, label=label, color=INK, histtype="step")
        powers = range(0, int(bins[-1]) + 1)
        axes.set_xticks(powers, [f"{2**power}" for power in powers])
        axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
        axes.set_yticks([])
        axes.set_ylabel("share of the loss", fontsize=6)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(fontsize=6, frameon=False)
        sheet.text(left, top, f"{title}, {len(next(iter(found.values())).area):,} pairs")


def _neighbours_sheet(config: SheetConfig, data: Beton, store: TargetStore, image_ids: np.ndarray) -> "Sheet":
    """A block an image: the image, and a row a view with its neighbours."""
    manifest = store.manifest
    recipe, columns = Recipe.from_dict(manifest.recipe), min(config.views, len(manifest.view_ids))
    wanted_chunks = min(-(-config.search // manifest.chunk_rows), manifest.num_chunks)
    chunks = _choose(manifest.num_chunks, wanted_chunks, config.spread)
    found = nearest(store, image_ids, columns, chunks.tolist(), config.neighbours)

    backend = "torch" if manifest.geometry == "pillow" else "auto"
    shown = np.unique(np.concatenate([image_ids, found.image_ids.ravel()]))
    pixels = load_views(data, recipe, manifest.seed, backend, shown, [(manifest.view_size, manifest.view_ids)])

    view_at, first_at = IMAGE + 2 * GAP, IMAGE + TILE + 6 * GAP
    row_height = TILE + LINE + GAP
    block_height = max(columns * row_height, IMAGE + LINE + GAP) + 2 * GAP
    rows = sum(min(manifest.chunk_rows, manifest.num_images - chunk * manifest.chunk_rows) for chunk in chunks.tolist())
    sheet = Sheet(
        first_at + config.neighbours * (TILE + GAP) - GAP,
        len(image_ids) * block_height + LINE,
        f"{store.path.name}: what {manifest.teacher} finds alike",
        f"{manifest.view_size} px views of recipe {recipe.name}, rows {_listed(image_ids)} of {data.num_images:,}; "
        f"neighbours are views of other images among {rows:,} rows, with the cosine of their {store.encoding.kind} targets",
    )
    sheet.text(0, 0, "image")
    sheet.text(view_at, 0, "cached view")
    sheet.text(first_at, 0, "nearest neighbours" + (" (green: same class)" if data.labels is not None else ""))
    for block, image_id in enumerate(image_ids):
        top = LINE + GAP + block * block_height
        sheet.image(0, top, data, image_id, recipe, manifest.seed, manifest.view_ids[:columns])
        for column, view_id in enumerate(manifest.view_ids[:columns]):
            down = top + column * row_height
            sheet.tile(view_at, down, TILE, pixels[image_id, view_id], _colour(view_id))
            sheet.text(view_at, down + TILE, f"view {view_id}", FAINT)
            neighbours = zip(*(values[block, column] for values in found), strict=True)
            for n, (other, other_column, cosine) in enumerate(neighbours):
                if np.isfinite(cosine):
                    left = first_at + n * (TILE + GAP)
                    sheet.tile(left, down, TILE, pixels[other, manifest.view_ids[other_column]])
                    same = data.labels is not None and data.labels[other] == data.labels[image_id]
                    sheet.text(
                        left, down + TILE, f"{cosine:.3f} {_caption(data, other)}", SAME_CLASS if same else FAINT
                    )
    return sheet


def load_views(
    data: Beton, recipe: Recipe, seed: int, backend: str, image_ids: np.ndarray, sets: list[tuple[int, tuple[int, ...]]]
) -> dict[tuple[int, int], np.ndarray]:
    """(image id, view id) -> (S, S, 3) uint8 as networks see it before normalisation, for ``sets`` of (size S, view ids)."""
    loader = ViewLoader(data, recipe, seed, LoaderConfig(backend, batch_size=16, workers=2))
    pixels = {}
    for batch in loader.epoch(image_ids, [ViewSet(ids, size) for size, ids in sets]):
        for number, (size, ids) in enumerate(sets):
            crop = recipe.local_crop if ids[0] >= LOCAL else recipe.global_crops[0]
            assert crop is not None
            seen = batch.augment(number, size / crop.size, torch.zeros(3), torch.ones(3))
            seen = seen.mul_(255).round_().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
            pixels |= {(int(i), v): seen[row, n] for row, i in enumerate(batch.image_ids) for n, v in enumerate(ids)}
    return pixels


# ==== drawing ====


class Sheet:
    """A page of tiles placed in inches from the top left corner of what is below its title."""

    def __init__(self, width: float, height: float, title: str, subtitle: str) -> None:
        titles, subtitles = wrap(title, int(width / 0.11)), wrap(subtitle, int(width / 0.055))  # inches a letter
        below_titles = MARGIN + 0.2 * len(titles) + 0.03
        self.head = below_titles + LINE * len(subtitles) + 0.07
        self.width, self.height = width + 2 * MARGIN, self.head + height + MARGIN
        self.figure = Figure((self.width, self.height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        for n, line in enumerate(titles):
            self._write(MARGIN, MARGIN + 0.2 * n, line, 11, INK, "bold")
        for n, line in enumerate(subtitles):
            self._write(MARGIN, below_titles + LINE * n, line, 7, FAINT)

    def text(self, left: float, top: float, text: str, colour: str = INK) -> None:
        self._write(MARGIN + left, self.head + top, text, 7, colour)

    def _write(self, left: float, top: float, text: str, points: int, colour: str, weight: str = "normal") -> None:
        x, y = left / self.width, 1 - (top + 0.035) / self.height
        self.figure.text(
            x, y, printable(text), size=points, color=colour, weight=weight, ha="left", va="top", parse_math=False
        )

    def chart(self, left: float, top: float, width: float, height: float):
        """Empty axes at these inches."""
        bottom = self.head + top + height
        return self.figure.add_axes(
            ((MARGIN + left) / self.width, 1 - bottom / self.height, width / self.width, height / self.height)
        )

    def tile(self, left: float, top: float, side: float, pixels: np.ndarray, frame: str | None = None):
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
        return axes

    def image(
        self, left: float, top: float, data: Beton, image_id: int, recipe: Recipe, seed: int, view_ids: tuple[int, ...]
    ) -> None:
        """The stored image with the boxes that its views are cropped from, and its name."""
        pixels = data.image(image_id)
        axes = self.tile(left, top, IMAGE, pixels)
        n, (height, width) = len(view_ids), pixels.shape[:2]
        heights, widths = np.full(n, height), np.full(n, width)
        crops = view_parameters(recipe, seed, np.full(n, image_id), np.array(view_ids), heights, widths).geometry
        columns = (LEFT, TOP, CROP_WIDTH, CROP_HEIGHT)
        for view_id, (x, y, wide, tall) in zip(view_ids, crops[:, columns].tolist(), strict=True):
            line = 0.9 if view_id >= LOCAL else 1.8
            halo = [withStroke(linewidth=line + 0.8, foreground="white")]
            axes.add_patch(
                Rectangle((x, y), wide, tall, fill=False, edgecolor=_colour(view_id), linewidth=line, path_effects=halo)
            )
        below = top + IMAGE * height / max(height, width)
        self.text(left, below, f"{image_id} {_tail(data.manifest.paths[image_id], 24)}", FAINT)

    def save(self, path: Path) -> None:
        self.figure.savefig(path, format="png", metadata={"Software": None})


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """To (width, height). Much enlarged pixels stay squares, which tells a small image from a blurred one."""
    image = Image.fromarray(pixels)
    factor = size[0] // image.width
    if factor >= 4:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.LANCZOS)


def _colour(view_id: int) -> str:
    colours = LOCAL_COLOURS if view_id >= LOCAL else GLOBAL_COLOURS
    return colours[view_id % LOCAL % len(colours)]


def _caption(data: Beton, image_id: int) -> str:
    if data.labels is None:
        return f"row {image_id}"
    label = int(data.labels[image_id])
    name = data.manifest.classes[label] if data.manifest.classes else f"class {label}"
    return name if len(name) <= 10 else f"{name[:8]}..."


def _listed(image_ids: np.ndarray) -> str:
    first, last = int(image_ids[0]), int(image_ids[-1])
    return f"{first:,} to {last:,}" if last - first == len(image_ids) - 1 else ", ".join(f"{i:,}" for i in image_ids)


def _tail(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[-most + 3 :]}"
