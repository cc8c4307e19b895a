"""The images that a file is compared with torch on, and calibrated on."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import MisuseError
from ...common.images.beton import Beton
from ..evaluate.network import FrozenNetwork
from .config import ExportConfig
from .input_form import to_pixels
from .subject import Subject

DRAWN = 64
"""Pictures drawn to check a float file on, where there are no images."""
PICTURES_OF_LOGITS = 50
"""At most so many images are compared where every pixel has its logits."""


@dataclass(frozen=True)
class Sample:
    """The images of an export: pixels (N, S, S, 3) uint8 to check on and to calibrate on, labels (N,) of the former if known."""

    pixels: Tensor
    calibration: Tensor
    labels: Tensor | None
    source: str


def take_sample(subject: Subject, config: ExportConfig) -> Sample:
    """Images of ``data``, the same for every network; without them drawn pictures."""
    info, cpu = subject.info, torch.device("cpu")
    network = FrozenNetwork(info.name, subject.network, info.image_size, info.mean, info.std, subject.weights, cpu)
    most = min(config.images, PICTURES_OF_LOGITS) if subject.task == "segment" else config.images
    generator = torch.Generator().manual_seed(0)
    if config.data is None:
        coarse = torch.rand(DRAWN, 3, 6, 6, generator=generator)
        pictures = F.interpolate(coarse, (network.size, network.size), mode="bicubic").clamp(0, 1)
        pixels = (255 * pictures).byte().permute(0, 2, 3, 1).contiguous()
        return Sample(pixels, pixels[:0], None, "drawn pictures")
    data = Beton(config.data)
    if data.num_images < 2:
        raise MisuseError(f"`data` {config.data} has {data.num_images} image: give two or more")
    order = torch.randperm(data.num_images, generator=generator)
    checked = order[:most]
    calibrated = order[-config.calibration :] if config.int8 else order[:0]
    ids = torch.cat([checked, calibrated]).unique()
    row = torch.full((data.num_images,), -1)
    row[ids] = torch.arange(len(ids))
    pixels = torch.empty((len(ids), network.size, network.size, 3), dtype=torch.uint8)
    for image_ids, images in network.centred(data, config.loader, ids.numpy()):
        pixels[row[image_ids]] = to_pixels(images, network.mean, network.std)
    labels = None if data.labels is None else torch.as_tensor(data.labels, dtype=torch.int64)[checked]
    if subject.task is not None:
        labels = _as_classes(labels, data.manifest.classes, subject)
    return Sample(pixels[row[checked]], pixels[row[calibrated]], labels, data.manifest.fingerprint)


def _as_classes(labels: Tensor | None, names: tuple[str, ...] | None, subject: Subject) -> Tensor | None:
    """Labels as the classifier numbers them, by name; None where an image has none, or one that it does not know."""
    if subject.task != "classify" or labels is None or labels.min() < 0 or subject.classes is None:
        return None
    numbers = {name: number for number, name in enumerate(subject.classes)}
    named = names or tuple(map(str, range(int(labels.max()) + 1)))
    found = torch.tensor([numbers.get(name, -1) for name in named])[labels]
    return None if found.min() < 0 else found
