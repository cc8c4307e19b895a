"""Contact sheets: images with their views, and what the teacher finds alike, on one PNG to judge by eye.

A ``.beton``'s sheet shows what a recipe does to its images. A target store's shows the very views that the teacher saw, each
with its nearest neighbours by the cached targets: when the neighbours make no sense, no student will learn any. Where the store
has targets of patches, they are colours over the view.
"""

from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.ticker import PercentFormatter

from ..errors import shortened
from ..files import replacing
from ..images.beton import Beton
from ..store.reader import TargetStore
from ..views.drawing import LOCAL
from ..views.loader import LoaderConfig, ViewLoader, ViewSet
from ..views.recipes import Recipe, get_recipe
from .config import SheetConfig
from .neighbours import nearest
from .pair_ratios import pair_ratios, weighted_median
from .patch_colours import cached_maps, laid_over, patch_colours
from .sheet import (
    FAINT,
    GAP,
    IMAGE,
    INK,
    LINE,
    PAGE,
    SAME_CLASS,
    TILE,
    Sheet,
    class_of,
    colour_of,
    number_of,
)

BETWEEN = 0.35
"""Inches between what does not belong together."""
CHART_WIDTH, CHART_HEIGHT = 5.0, 2.5
"""Inches."""
RATIO_IMAGES = 2000
"""Images whose pairs are in the histograms."""
SMALL = (IMAGE - GAP) / 2
"""Inches: two of these are as tall as an image."""


def contact_sheet(config: SheetConfig) -> Path:
    """Draw the sheet as the PNG ``config.out``. Raises MisuseError when the store was not made from the data."""
    data = Beton(config.data)
    image_ids = _choose(data.num_images, config.images, config.spread)
    if config.store is None:
        sheet = _views_sheet(config, data, image_ids)
    else:
        store = TargetStore.open(config.store)
        store.check_data(data.manifest)
        sheet = _neighbours_sheet(config, data, store, image_ids)
    with replacing(config.out) as file:
        sheet.figure.savefig(file, format="png", metadata={"Software": None})
    return config.out


def _choose(available: int, count: int, spread: bool) -> np.ndarray:
    count = min(count, available)
    return np.linspace(0, available, count, endpoint=False).astype(np.int64) if spread else np.arange(count)


# ==== the two sheets ====


class Grid(NamedTuple):
    """Blocks of tiles of the same size, as many side by side as the page has room for."""

    blocks: int
    width: float
    height: float

    @property
    def columns(self) -> int:
        return max(1, min(self.blocks, int((PAGE + BETWEEN) / (self.width + BETWEEN))))

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of them all, in inches."""
        return self.columns * (self.width + BETWEEN) - BETWEEN, ceil(self.blocks / self.columns) * self.height

    def at(self, number: int) -> tuple[float, float]:
        """Left and top of a block."""
        return number % self.columns * (self.width + BETWEEN), number // self.columns * self.height


def _views_sheet(config: SheetConfig, data: Beton, image_ids: np.ndarray) -> Sheet:
    """A block an image: the image with the boxes of its global crops, and of its local ones, and both in two half-sized rows."""
    recipe, size = config.recipe, config.image_size or config.recipe.global_crops[0].size
    global_ids, local_ids = tuple(range(recipe.num_global)), tuple(range(LOCAL, LOCAL + recipe.num_local))
    groups = [("global", size, global_ids)]
    if recipe.local_crop and local_ids:
        groups.append(("local", recipe.local_crop.size * size // recipe.global_crops[0].size, local_ids))
    pixels = load_views(data, recipe, config.seed, "auto", image_ids, [group[1:] for group in groups])

    left, lefts = len(groups) * (IMAGE + GAP) + GAP, []
    for *_, ids in groups:
        lefts.append(left)
        left += ceil(len(ids) / 2) * (SMALL + GAP) + 2 * GAP
    grid = Grid(len(image_ids), max(left - 3 * GAP, IMAGE * 1.5), IMAGE + LINE + 2 * GAP)
    width, height = grid.size
    charts_at = width + BETWEEN
    sheet = Sheet(
        charts_at + CHART_WIDTH if config.ratios else width,
        LINE + max(height, 2 * (CHART_HEIGHT + BETWEEN) if config.ratios else 0),
        f"{config.data.name}: views of recipe {recipe.name}",
        f"rows {_listed(image_ids)} of {data.num_images:,}, seed {config.seed}; a view has the number and the colour of its box",
    )
    for column in range(grid.columns):
        at = grid.at(column)[0]
        for n, (kind, side, _) in enumerate(groups):
            sheet.text(at + n * (IMAGE + GAP), 0, f"where the {kind} crops are")
            sheet.text(at + lefts[n], 0, f"{kind}, {side} px")
    for block, image_id in enumerate(image_ids):
        at, top = grid.at(block)
        top += LINE + GAP
        for n, (_, _, ids) in enumerate(groups):
            caption = _caption(data, image_id) if n == 0 else ""
            sheet.image(at + n * (IMAGE + GAP), top, data, image_id, recipe, config.seed, ids, caption)
            per_row = ceil(len(ids) / 2)
            for place, view_id in enumerate(ids):
                across, down = at + lefts[n] + place % per_row * (SMALL + GAP), top + place // per_row * (SMALL + GAP)
                shown = pixels[image_id, view_id]
                sheet.tile(across, down, SMALL, shown, colour_of(view_id), number_of(view_id))
    if config.ratios:
        _draw_ratios(sheet, charts_at, config, data, size)
    return sheet


def _draw_ratios(sheet: Sheet, left: float, config: SheetConfig, data: Beton, size: int) -> None:
    """Two histograms over the pairs that meet in the loss, by their share of it, of the recipe (filled) and of ``dino`` unchanged
    (line).
    """
    some = slice(0, RATIO_IMAGES)
    usual = get_recipe("dino")
    recipes = {f"recipe {config.recipe.name}": config.recipe, "recipe dino, unchanged": usual}
    if config.recipe == usual:
        del recipes["recipe dino"]
    found = {n: pair_ratios(r, config.seed, data.heights[some], data.widths[some]) for n, r in recipes.items()}
    fields = {
        "area": "larger crop's area over the smaller one's",
        "magnification": "times larger that a thing appears in one of the two views",
    }
    pairs = len(next(iter(found.values())).area)
    sheet.text(left, 0, f"how different the two views of a pair are, in scale ({pairs:,} pairs)")
    for n, (field_name, title) in enumerate(fields.items()):
        top = LINE + 2 * GAP + n * (CHART_HEIGHT + BETWEEN)
        axes = sheet.chart(left + 0.5, top, CHART_WIDTH - 0.6, CHART_HEIGHT - 0.55)
        shown = {name: np.log2(getattr(ratios, field_name)) for name, ratios in found.items()}
        bins = np.linspace(0, max([1.0, *(values.max() for values in shown.values() if values.size)]), 40).tolist()
        for (name, values), style in zip(
            shown.items(), ({"color": "#89c2d9"}, {"color": INK, "histtype": "step"}), strict=False
        ):
            if values.size:
                weight = found[name].weight
                label = f"{name}: median {2 ** weighted_median(values, weight):.1f}"
                axes.hist(values, bins, weights=weight / weight.sum(), label=label, **style)  # pyright: ignore[reportArgumentType]
        powers = range(0, int(bins[-1]) + 1)
        axes.set_xticks(powers, [f"{2**power}" for power in powers])
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.locator_params(axis="y", nbins=4)
        axes.set_xlabel(title, fontsize=8)
        axes.set_ylabel("share of the loss", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper right")


def _neighbours_sheet(config: SheetConfig, data: Beton, store: TargetStore, image_ids: np.ndarray) -> Sheet:
    """A block an image: the image, and a row a view with its patches, where they are cached, and its neighbours."""
    manifest = store.manifest
    recipe, columns = Recipe.from_dict(manifest.recipe), min(config.views, len(manifest.view_ids))
    wanted_chunks = min(-(-config.search // manifest.chunk_rows), manifest.num_chunks)
    chunks = _choose(manifest.num_chunks, wanted_chunks, config.spread)
    found = nearest(store, image_ids, columns, chunks.tolist(), config.neighbours)

    backend = "torch" if manifest.geometry == "pillow" else "auto"
    shown = np.unique(np.concatenate([image_ids, found.image_ids.ravel()]))
    pixels = load_views(data, recipe, manifest.seed, backend, shown, [(manifest.view_size, manifest.view_ids)])

    view_at, patches_at = IMAGE + 2 * GAP, IMAGE + TILE + 3 * GAP
    patches = _cached_patches(store, image_ids, columns)
    first_at = patches_at + 3 * GAP + (0 if patches is None else TILE + GAP)
    row_height = TILE + LINE + GAP
    grid = Grid(
        len(image_ids),
        first_at + max(3, config.neighbours) * (TILE + GAP) - GAP,  # what is written above them needs three
        max(columns * row_height, IMAGE + LINE + GAP) + GAP,
    )
    width, height = grid.size
    rows = sum(min(manifest.chunk_rows, manifest.num_images - chunk * manifest.chunk_rows) for chunk in chunks.tolist())
    sheet = Sheet(
        width,
        height + LINE,
        f"{store.path.name}: what {manifest.teacher} finds alike",
        f"{manifest.view_size} px views of recipe {recipe.name}, rows {_listed(image_ids)} of {data.num_images:,}; "
        f"neighbours are views of other images among {rows:,} rows, with the cosine of their {store.encoding.kind} targets",
    )
    for column in range(grid.columns):
        at = grid.at(column)[0]
        sheet.text(at, 0, "image")
        sheet.text(at + view_at, 0, "cached view" if patches is None else "cached view, and its patches")
        sheet.text(at + first_at, 0, "nearest neighbours" + (" (green: same class)" if data.labels is not None else ""))
    for block, image_id in enumerate(image_ids):
        at, top = grid.at(block)
        top += LINE + GAP
        ids = manifest.view_ids[:columns]
        sheet.image(at, top, data, image_id, recipe, manifest.seed, ids, _caption(data, image_id))
        for column, view_id in enumerate(ids):
            down = top + column * row_height
            view = pixels[image_id, view_id]
            sheet.tile(at + view_at, down, TILE, view, colour_of(view_id), number_of(view_id))
            if patches is not None:
                sheet.tile(at + patches_at, down, TILE, laid_over(view, patches[block, column]))
            neighbours = zip(*(values[block, column] for values in found), strict=True)
            for n, (other, other_column, cosine) in enumerate(neighbours):
                if np.isfinite(cosine):
                    left = at + first_at + n * (TILE + GAP)
                    sheet.tile(left, down, TILE, pixels[other, manifest.view_ids[other_column]])
                    same = data.labels is not None and data.labels[other] == data.labels[image_id] >= 0
                    name = shortened(class_of(data, other) or f"row {other}", 10)
                    sheet.text(left, down + TILE, f"{cosine:.2f} {name}", SAME_CLASS if same else FAINT)
    return sheet


def _cached_patches(store: TargetStore, image_ids: np.ndarray, columns: int) -> np.ndarray | None:
    """(B, columns, grid, grid, 3) uint8; None: there are no targets of patches."""
    if store.patches is None:
        return None
    maps = cached_maps(store, image_ids)[:, :columns]
    return patch_colours(maps.flatten(0, 1)).reshape(*maps.shape[:2], *maps.shape[3:], 3)


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


def _caption(data: Beton, image_id: int) -> str:
    """The class, the row and the name of an image."""
    kind, name = class_of(data, image_id), data.manifest.paths[image_id].rpartition("/")[2]
    words = f"{shortened(kind, 14)}: {image_id} " if kind else f"{image_id} "
    return words + shortened(name, 28 - len(words), tail=True)


def _listed(image_ids: np.ndarray) -> str:
    first, last = int(image_ids[0]), int(image_ids[-1])
    return f"{first:,} to {last:,}" if last - first == len(image_ids) - 1 else ", ".join(f"{i:,}" for i in image_ids)
