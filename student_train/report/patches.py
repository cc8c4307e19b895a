"""What teacher and students find alike within images: maps of their patches as colours, over the very views of the targets."""

from collections.abc import Sequence

import numpy as np
import torch
from markupsafe import Markup

from ...common.errors import MisuseError
from ...common.look.contact_sheet import load_views
from ...common.look.patch_colours import cached_maps, laid_over, patch_colours
from ...common.store.reader import TargetStore
from ...common.views.loader import ViewLoader
from ...common.views.recipes import Recipe
from ..evaluate.network import FrozenNetwork
from ..students import pooled_and_map
from .config import ReportConfig
from .page import caption, code, missing, tag, tile
from .run import Run
from .shown_images import Images, stores_of


def patches(runs: Sequence[Run], images: Images, rows: list[int], config: ReportConfig, device: torch.device) -> Markup:
    """A line an image: its first cached view, the teacher's targets of its patches, and each run's last map of the same view."""
    stores = [store for run in runs for store in stores_of(run, images.data) if store.patches is not None]
    if not stores:
        return missing(
            "No run has targets of patches at hand:", code("rob cache-teacher --patches grid"), "makes them."
        )
    store, ids = stores[0], images.ids[rows]
    manifest = store.manifest
    recipe, view = Recipe.from_dict(manifest.recipe), manifest.view_ids[0]
    backend = "torch" if manifest.geometry == "pillow" else "auto"
    views = load_views(images.data, recipe, manifest.seed, backend, ids, [(manifest.view_size, (view,))])
    columns = {manifest.teacher: patch_colours(cached_maps(store, ids)[:, 0])}
    columns |= {
        run.name: found for run in runs if (found := _of_student(run, images, ids, store, config, device)) is not None
    }
    lines = []
    for number, (row, image_id) in enumerate(zip(rows, ids.tolist(), strict=True)):
        seen = views[image_id, view]
        drawn = [tile(laid_over(seen, colours[number]), name) for name, colours in columns.items()]
        name = images.class_of(row) or images.path_of(row)
        lines.append(tag("div", tile(seen, name, images.path_of(row), "query"), *drawn, class_="tiles row"))
    told = caption(
        f"The first cached view of {store.path.name}; beside it the targets of its patches, and what the students' last maps are "
        "of the same pixels. Places of one colour are alike to that network, in all images of a column; columns have colours of "
        "their own. A student that has learned from patches parts things where its teacher does."
    )
    return Markup("\n").join([told, *lines])


@torch.no_grad()
def _of_student(
    run: Run, images: Images, ids: np.ndarray, store: TargetStore, config: ReportConfig, device: torch.device
) -> np.ndarray | None:
    """(B, h, w, 3) uint8; None: it has no weights, or no map."""
    if not run.has_weights:
        return None
    network, manifest = FrozenNetwork.student(run.folder, device), store.manifest
    loader = ViewLoader(images.data, Recipe.from_dict(manifest.recipe), manifest.seed, config.loader)
    found = {}
    try:
        for some, pixels in network.batches(loader, ids, manifest.view_ids[0]):
            found |= dict(zip(some.tolist(), pooled_and_map(network.embed, pixels)[1].cpu(), strict=True))  # type: ignore[arg-type]
    except (AttributeError, MisuseError):
        return None
    return patch_colours(torch.stack([found[image_id] for image_id in ids.tolist()]))
