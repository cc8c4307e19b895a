"""Where a student looks: the attention of a ViT's last block, or what each place of a CNN's last map adds to its embedding.

Selvaraju et al. (1610.02391) weigh a map's channels by a class's gradient. A student has no classes; its embedding takes their
place: of the mean g of the map f, the place p adds <f_p, g> / |g| to the length of g, and this is what is drawn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from matplotlib import colormaps
from timm.models import Beit, Eva, VisionTransformer
from timm.utils import AttentionExtract
from torch import Tensor

from ...common.errors import MisuseError
from ...common.look.patch_colours import laid_over
from ..evaluate.network import FrozenNetwork
from .config import ReportConfig
from .page import caption, missing, tag, tile
from .run import Run
from .shown_images import Images


def looks(runs: Sequence[Run], images: Images, rows: list[int], config: ReportConfig, device: torch.device) -> Markup:
    """A line an image: as the student takes it, and how much of its last layer is where, for each run."""
    lines: dict[int, list[Markup]] = {row: [] for row in rows}
    parts, kinds = [], []
    for run in runs:
        if not run.has_weights:
            continue
        network = FrozenNetwork.student(run.folder, device)
        batches = list(network.centred(images.data, config.loader, images.ids[rows]))
        ids, pixels = torch.cat([i for i, _ in batches]), torch.cat([x for _, x in batches])
        found = last_map(network.embed, pixels)
        if found is None:
            parts.append(missing(f"{run.name}: {run.student} has neither attention nor a last map that can be drawn."))
            continue
        kind, places = found
        kinds.append(kind)
        mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (network.mean, network.std))
        for image_id, image, place in zip(ids.tolist(), pixels, places, strict=True):
            seen = ((image * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
            row = rows[int(np.flatnonzero(images.ids[rows] == image_id)[0])]
            if not lines[row]:
                name = images.class_of(row) or images.path_of(row)
                lines[row].append(tile(seen, name, images.path_of(row), "query"))
            lines[row].append(tile(overlaid(seen, place), f"{run.name}: {kind}"))
    if kinds:
        told = (
            "Bright is much, dark is little, each picture by itself. A student that looks at the thing should be brightest "
            "there; bright corners on every image speak of a habit, not of what is seen."
        )
        if "attention" in kinds:
            told += " Attention: of the class token (without one, of all patches) in the last block, mean over heads."
        if "activation" in kinds:
            told += " Activation: how much a place of the last map adds to the embedding."
        parts.insert(0, caption(told))
    return Markup("\n").join([*parts, *(tag("div", *line, class_="tiles row") for line in lines.values() if line)])


@torch.no_grad()
def last_map(backbone: Any, images: Tensor) -> tuple[str, Tensor] | None:
    """What it is, and (B, h, w) of any scale, of normalised images (B, 3, S, S); None: the network has no such thing.

    A ViT is left with a hook: give one that is used for nothing else.
    """
    if isinstance(backbone, VisionTransformer | Eva | Beit):  # others have blocks of another attention
        return "attention", _attention(backbone, images)
    try:
        features = backbone.forward_features(images) if hasattr(backbone, "forward_features") else None
    except MisuseError:  # a network that is not timm's, whose pooled layer is no map
        return None
    if features is None or features.dim() != 4 or features.shape[1] != getattr(backbone, "num_features", -1):
        return None
    mean = features.mean((2, 3))
    return "activation", torch.einsum("bchw,bc->bhw", features, F.normalize(mean, dim=1)).clamp_min(0)


def _attention(backbone: Any, images: Tensor) -> Tensor:
    block = f"blocks.{len(backbone.blocks) - 1}.attn"
    backbone.blocks[-1].attn.fused_attn = False  # a fused one never has the matrix
    (found,) = AttentionExtract(backbone, names=[f"{block}.attn_drop"], method="hook")(images).values()
    prefix = backbone.num_prefix_tokens
    of = found[:, :, 0] if backbone.cls_token is not None else found[:, :, prefix:].mean(2)
    patches = of[:, :, prefix:].mean(1)  # over heads
    height, width = backbone.patch_embed.dynamic_feat_size(images.shape[-2:])
    return patches.unflatten(1, (height, width))


def overlaid(pixels: np.ndarray, place: Tensor) -> np.ndarray:
    """(S, S, 3) uint8 of the picture in grey under the map (h, w), which is stretched to its own range."""
    size = pixels.shape[:2]
    wide = F.interpolate(place[None, None].float().cpu(), size, mode="bilinear", align_corners=False)[0, 0]
    wide = (wide - wide.min()) / (wide.max() - wide.min()).clamp_min(1e-12)
    colours = colormaps["viridis"](wide.numpy(), bytes=True)[..., :3]  # lighter is more, so it is read without colour
    return laid_over(pixels, colours)
