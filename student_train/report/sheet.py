"""Some training images and the views that student and teacher had of them."""

import numpy as np
from markupsafe import Markup

from ...common.images.beton import Beton
from ...common.look.contact_sheet import load_views
from ...common.views.drawing import CROP_HEIGHT, CROP_WIDTH, LEFT, LOCAL, TOP, view_parameters
from ...common.views.recipes import Recipe
from .page import COLOURS, caption, tag, tile
from .run import Run
from .shown_images import Images

MOST_LOCAL = 6


def sheet(run: Run, images: Images, rows: list[int]) -> Markup:
    """A line an image: the image with the boxes of its crops, and the crops, each with its box's number."""
    recipe = Recipe.from_dict(run.settings["recipe"])
    seed = int(run.settings["branch"]["seed"])  # of the views, a store's where there is one; the training has its own
    size, num_local = int(run.settings["student"]["image_size"]), int(run.settings["pairing"]["num_local"])
    whole = tuple(range(recipe.num_global))
    local = tuple(range(LOCAL, LOCAL + min(num_local, MOST_LOCAL)))
    sets = [(size, whole)]
    if recipe.local_crop and local:
        usual = round(size * recipe.local_crop.size / recipe.global_crops[0].size)
        sets.append((run.settings.get("local_size") or usual, local))
    ids = images.ids[rows]
    pixels = load_views(images.data, recipe, seed, "auto", ids, sets)
    lines = []
    for row, image_id in zip(rows, ids, strict=True):
        boxes = _boxes(images.data, recipe, seed, int(image_id), whole + local)
        crops = [
            tile(pixels[int(image_id), view], f"{'local' if view >= LOCAL else 'global'} {number}")
            for number, view in enumerate(whole + local, 1)
        ]
        name = images.class_of(row) or images.path_of(row)
        original = tile(images.data.image(int(image_id)), name, images.path_of(row), "query whole", boxes)
        lines.append(tag("div", original, *crops, class_="tiles row"))
    told = caption(
        f"Recipe {recipe.name}, seed {seed}, of run {run.name}: on the left the image with the boxes that its crops are cut "
        "from, then the crops as the network sees them, with the numbers of their boxes. What a class goes by should be left in "
        "most global crops; where it is not, raise the lower end of --global-scale, or lower --colour."
    )
    return Markup("\n").join([told, *lines])


def _boxes(data: Beton, recipe: Recipe, seed: int, image_id: int, views: tuple[int, ...]) -> Markup:
    height, width = int(data.heights[image_id]), int(data.widths[image_id])
    n = len(views)
    drawn = view_parameters(recipe, seed, np.full(n, image_id), np.array(views), np.full(n, height), np.full(n, width))
    places = drawn.geometry[:, (LEFT, TOP, CROP_WIDTH, CROP_HEIGHT)].tolist()
    found = []
    for number, (left, top, wide, tall) in enumerate(places, 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        style = (
            f"left:{100 * left / width:.1f}%;top:{100 * top / height:.1f}%;width:{100 * wide / width:.1f}%;"
            f"height:{100 * tall / height:.1f}%;border-color:{colour}"
        )
        found.append(tag("span", tag("b", number), class_="box", style=style))
    return Markup("").join(found)
