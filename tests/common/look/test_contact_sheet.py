"""Contact sheets, as pixels on a page."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

from rob.cli import main
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.look import contact_sheet as sheets
from rob.common.look.contact_sheet import SMALL, SheetConfig, contact_sheet, load_views
from rob.common.look.neighbours import nearest
from rob.common.look.pair_ratios import pair_ratios, weighted_median
from rob.common.look.patch_colours import cached_maps, laid_over, patch_colours
from rob.common.look.sheet import DPI, IMAGE, MARGIN, TILE, Sheet
from rob.common.store.patches import PatchChoice
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import LOCAL
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import Recipe, get_recipe
from support import tiny


class Recorder(Sheet):
    """Keeps every tile as (left, top, side, pixels, frame)."""

    made: "list[Recorder]"

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.tiles = []
        Recorder.made.append(self)

    def tile(self, left, top, side, pixels, frame=None, badge=None):
        self.tiles.append((left, top, side, pixels, frame))
        return super().tile(left, top, side, pixels, frame, badge)


@pytest.fixture
def drawn(monkeypatch):
    """Draws the sheet of a config: the recorded Sheet and the PNG's pixels."""
    Recorder.made = []
    monkeypatch.setattr(sheets, "Sheet", Recorder)

    def draw(config: SheetConfig) -> tuple[Recorder, np.ndarray]:
        assert contact_sheet(config) == config.out
        with Image.open(config.out) as image:
            return Recorder.made[-1], np.asarray(image.convert("RGB"))

    return draw


def assert_nothing_is_cut(sheet: Sheet) -> None:
    whole = sheet.figure.bbox
    for artist in [*sheet.figure.axes, *sheet.figure.findobj(Text)]:
        box = artist.get_window_extent()
        inside = whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        assert inside, (artist, box)


def test_views_on_a_sheet_are_those_the_teacher_sees(data) -> None:
    recipe = get_recipe("dino")
    views = load_views(data, recipe, 3, "torch", np.array([2, 5]), [(40, (0, 1)), (20, (LOCAL, LOCAL + 4))])
    assert views.keys() == {(image, view) for image in (2, 5) for view in (0, 1, LOCAL, LOCAL + 4)}
    loader = ViewLoader(data, recipe, 3, LoaderConfig("torch", batch_size=1, workers=1))
    batch = next(loader.epoch(np.array([5]), [ViewSet((LOCAL + 4,), 20)]))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    seen = apply_colours(batch.views[0].flatten(0, 1), batch.colour[0].flatten(0, 1), 20 / 96, mean, std)
    pixels = (seen[0] * std[:, None, None] + mean[:, None, None]) * 255
    assert np.abs(views[5, LOCAL + 4] - pixels.permute(1, 2, 0).numpy()).max() < 0.51


SCREEN = 1080
"""Pixels in height."""


def test_sheet_of_packed_images(data, tmp_path, drawn) -> None:
    """At most a screen tall; boxes of global and of local crops on images of their own, with the numbers of their views."""
    sheet, png = drawn(SheetConfig(data.path, tmp_path / "new" / "sheet.png", recipe=get_recipe("dino")))
    assert_nothing_is_cut(sheet)
    assert png.shape[0] <= SCREEN
    np.testing.assert_allclose(png.shape[:2], (sheet.height * DPI, sheet.width * DPI), atol=1)
    assert len(sheet.tiles) == 4 * (2 + 2 + 10)
    expected = load_views(data, get_recipe("dino"), 0, "auto", np.arange(4), [(224, (0, 1)), (96, (LOCAL + 7,))])
    image_tiles = [tile[3] for tile in sheet.tiles if tile[2] == IMAGE]
    views = [tile[3] for tile in sheet.tiles if tile[2] == SMALL]
    assert np.array_equal(image_tiles[2], data.image(1))
    assert np.array_equal(views[12 + 1], expected[1, 1])
    assert np.array_equal(views[12 + 2 + 7], expected[1, LOCAL + 7])
    frames = [tile[4] for tile in sheet.tiles[:14] if tile[4]]
    assert len(set(frames)) == len(frames) == 12  # every view of an image has a frame of its own colour
    texts = [text.get_text() for text in sheet.figure.findobj(Text)]
    assert texts.count("10") == 2 * 4  # on a box and on its view
    assert any(text.startswith(f"class{data.labels[1]}: 1 ") for text in texts)


def test_tiles_are_at_their_place_on_the_page(data, tmp_path, drawn) -> None:
    sheet, png = drawn(SheetConfig(data.path, tmp_path / "sheet.png", images=1, recipe=get_recipe("weak")))
    left, top, side, pixels, _ = sheet.tiles[1]
    x, y = round((MARGIN + left) * DPI), round((sheet.head + top) * DPI)
    shown = png[y : y + round(side * DPI), x : x + round(side * DPI)][20:-8, 8:-8]
    reference = np.asarray(Image.fromarray(pixels).resize((round(side * DPI),) * 2, Image.Resampling.LANCZOS))[
        20:-8, 8:-8
    ]
    assert np.abs(shown.astype(int) - reference).mean() < 3


def test_sheet_of_a_store(store, data, tmp_path, drawn) -> None:
    whole, _ = drawn(SheetConfig(data.path, tmp_path / "sheet.png", store.path))
    assert whole.height * DPI <= SCREEN
    sheet, _ = drawn(SheetConfig(data.path, tmp_path / "sheet.png", store.path, images=2, neighbours=3))
    assert_nothing_is_cut(sheet)
    assert len(sheet.tiles) == 2 * (1 + 2 * (1 + 3))
    found = nearest(store, np.arange(2), 2, [0], count=3)
    recipe = Recipe.from_dict(store.manifest.recipe)
    views = load_views(data, recipe, store.manifest.seed, "auto", np.arange(24), [(32, (0, 1))])
    tiles = [tile[3] for tile in sheet.tiles if tile[2] == TILE][8:]  # of the second image
    for view in range(2):
        assert np.array_equal(tiles[4 * view], views[1, view])
    texts = [text.get_text() for text in sheet.figure.findobj(Text)]
    for place in range(3):
        other, column = found.image_ids[1, 1, place], found.columns[1, 1, place]
        assert np.array_equal(tiles[-3 + place], views[other, column])
        assert f"{found.cosines[1, 1, place]:.2f} class{data.labels[other]}" in texts


def test_cached_patches_are_colours_beside_each_view(data, headless, tmp_path, drawn) -> None:
    store = tiny.tiny_store(tmp_path / "p.zarr", data, headless, view_size=64, patches=PatchChoice("grid", patch_dim=8))
    maps = cached_maps(store, np.arange(2))
    assert maps.shape == (2, 2, 8, 2, 2)
    sheet, _ = drawn(SheetConfig(data.path, tmp_path / "sheet.png", store.path, images=2, neighbours=3))
    tiles = [tile[3] for tile in sheet.tiles if tile[2] == TILE]
    assert len(tiles) == 2 * 2 * (1 + 1 + 3)
    assert np.array_equal(tiles[1], laid_over(tiles[0], patch_colours(maps.flatten(0, 1))[0]))


def test_small_and_unlabelled_stores_have_sheets_too(tmp_path, drawn) -> None:
    images = tmp_path / "flat"
    images.mkdir()
    for row, path in enumerate(sorted(tiny.tiny_images(tmp_path / "images", 3).rglob("*.jpg"))):
        path.rename(images / f"a-picture-with-quite-a-long-name-{row}.jpg")
    Image.new("RGB", (20, 60)).save(images / "tall.png")
    pack(PackConfig(str(images), tmp_path / "a.beton", workers=1))
    data = Beton(tmp_path / "a.beton")
    assert data.labels is None
    store = tiny.tiny_store(tmp_path / "a.zarr", data, tiny.tiny_teacher_checkpoint(tmp_path), views=1)
    sheet, _ = drawn(SheetConfig(data.path, tmp_path / "sheet.png", store.path, images=50, neighbours=5))
    assert_nothing_is_cut(sheet)
    assert len(sheet.tiles) == 4 * (1 + 1 + 3)  # each image has three others
    narrow, _ = drawn(SheetConfig(data.path, tmp_path / "sheet.png", store.path, neighbours=1))
    assert_nothing_is_cut(narrow)


def test_images_may_be_spread_over_the_data(data, store, tmp_path, drawn) -> None:
    sheet, _ = drawn(SheetConfig(data.path, tmp_path / "sheet.png", store.path, images=3, spread=True))
    shown = [tile[3] for tile in sheet.tiles if tile[2] == IMAGE]
    assert all(np.array_equal(pixels, data.image(row)) for pixels, row in zip(shown, (0, 8, 16), strict=True))


def test_a_sheet_is_a_png_of_some_images(tmp_path) -> None:
    data = Path("a.beton")
    assert SheetConfig(data, tmp_path / "a.PNG", images=64).images == 64
    with pytest.raises(MisuseError, match="`images` is 65, expected at most 64"):
        SheetConfig(data, tmp_path / "a.png", images=65)
    for name in ("x.txt", "x", "data.beton"):
        with pytest.raises(MisuseError, match=rf"{name}: expected a name that ends with \.png, such as .*\.png"):
            SheetConfig(data, tmp_path / name)


def test_the_same_sheet_has_the_same_bytes(data, tmp_path) -> None:
    for name in ("a.png", "b.png"):
        contact_sheet(SheetConfig(data.path, tmp_path / name, images=1))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_store_of_other_data_is_refused(store, tmp_path) -> None:
    other = tiny.tiny_beton(tmp_path, seed=1)
    with pytest.raises(MisuseError, match="another data set"):
        contact_sheet(SheetConfig(other.path, tmp_path / "sheet.png", store.path))


def test_options_out_of_range(data, tmp_path) -> None:
    with pytest.raises(MisuseError, match="`images` is 0"):
        SheetConfig(data.path, tmp_path / "sheet.png", images=0)


# ==== rob views ====


@pytest.fixture
def rob_views(data, tmp_path, monkeypatch, drawn):
    """Runs ``rob views``: the recorded Sheet and the PNG's pixels."""

    def run(*arguments: str) -> tuple[Recorder, np.ndarray]:
        png = tmp_path / "views.png"
        words = ["rob", "views", str(png), "--data", str(data.path), "--images", "2", "--overwrite", *arguments]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        with Image.open(png) as image:
            return Recorder.made[-1], np.asarray(image.convert("RGB"))

    return run


def charts_of(sheet: Sheet, png: np.ndarray) -> list[tuple[Axes, np.ndarray]]:
    """The axes without a picture, each with its (H, W, 3) pixels."""
    height, width = png.shape[:2]
    charts = []
    for axes in sheet.figure.axes:
        if not axes.images:
            box = axes.get_position()
            rows, columns = (1 - np.array([box.y1, box.y0])) * height, np.array([box.x0, box.x1]) * width
            charts.append((axes, png[slice(*rows.astype(int)), slice(*columns.astype(int))]))
    return charts


def test_views_are_drawn_with_how_much_pairs_differ(data, rob_views) -> None:
    areas = {}
    for name in ("dino", "sslight"):
        recipe = get_recipe(name)
        sheet, png = rob_views("--recipe", name, "--seed", "3", "--image-size", "32")
        assert_nothing_is_cut(sheet)
        assert len([tile for tile in sheet.tiles if tile[2] == IMAGE]) == 2 * 2
        assert {tile[3].shape[0] for tile in sheet.tiles if tile[2] == SMALL} == {32, {"dino": 13, "sslight": 18}[name]}
        charts = charts_of(sheet, png)
        assert len(charts) == 2
        found = pair_ratios(recipe, 3, data.heights, data.widths)
        usual = pair_ratios(get_recipe("dino"), 3, data.heights, data.widths)
        for (axes, pixels), field in zip(charts, ("area", "magnification"), strict=True):
            medians = [weighted_median(getattr(ratios, field), ratios.weight) for ratios in (found, usual)]
            legend = axes.get_legend()
            assert legend is not None
            told = [text.get_text().rpartition(": median ") for text in legend.get_texts()]
            both = ["recipe dino, unchanged"] if name == "dino" else [f"recipe {name}", "recipe dino, unchanged"]
            assert [text for text, *_ in told] == both
            np.testing.assert_allclose([float(median) for *_, median in told], medians[: len(both)], atol=0.06)
            assert axes.get_xlabel()
            assert axes.get_ylabel() == "share of the loss"
            filled = (np.abs(pixels.astype(int) - (0x89, 0xC2, 0xD9)).max(2) < 8).mean()
            line = (pixels.max(2) < 0x40).mean()
            assert 0.05 < filled < 0.7
            assert name == "dino" or 0.005 < line < 0.2
            areas[name, field] = pixels
    for field in ("area", "magnification"):
        one, other = areas["dino", field], areas["sslight", field]
        rows, columns = np.minimum(one.shape[:2], other.shape[:2])
        assert (one[:rows, :columns] != other[:rows, :columns]).any(2).mean() > 0.05


@pytest.mark.parametrize(
    "options",
    [("--recipe", "moco-v2"), ("--recipe", "weak"), ("--recipe", "swav", "--num-local", "1")],
    ids=lambda options: options[1],
)
def test_the_charts_fit_below_few_views(rob_views, options) -> None:
    sheet, png = rob_views(*options)
    assert len(charts_of(sheet, png)) == 2
    assert_nothing_is_cut(sheet)


def test_an_area_for_local_crops_needs_local_crops(data, tmp_path, monkeypatch, capsys) -> None:
    words = ["views", str(tmp_path / "a.png"), "--data", str(data.path), "--local-scale", "0.1", "0.3", "--recipe"]
    for recipe, refused in (("moco-v2", True), ("weak", True), ("swav", False)):
        monkeypatch.setattr(sys, "argv", ["rob", *words, recipe, "--images", "1"])
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        if refused:
            assert ended.value.code == 2
            start, _, offered = error.strip().partition(", take ")
            assert start == f"error: --local-scale: recipe {recipe} has no local crops"
            assert {"mild", "dino", "msn"} <= set(offered.split(" or "))
            assert "moco-v2" not in offered
        assert (tmp_path / "a.png").exists() == (not refused)
