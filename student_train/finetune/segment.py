"""A student becomes a segmenter: trained on masks, the best epoch by mean intersection over union kept."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from ...common.errors import MisuseError
from ...common.exported import StudentInfo
from ...common.shared_memory import shared_memory_holds
from ..epochs import train_epochs
from ..evaluate.segmentation.data import IGNORED, SegmentationData
from ..evaluate.segmentation.layouts import open_segmentation
from ..evaluate.segmentation.score import Confusion, SegmentationScore
from .config import SegmentConfig
from .folder import TuneProgress, start_of, training_of, tuning_folder, write_history, write_outcome
from .segmenter import Segmenter
from .tuned import TASKS, Tuned, save_tuned


@dataclass(frozen=True)
class SegmentResult:
    """``score`` of the validation images at their own size, with the weights of ``best_epoch``."""

    weights: Path
    student: str
    score: SegmentationScore
    best_epoch: int
    epochs: int
    num_train: int
    num_val: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "weights": self.weights.name}


def finetune_segmenter(config: SegmentConfig, progress: TuneProgress | None = None) -> SegmentResult:
    """Train, or go on in ``config.out``, which ends with ``segmenter.safetensors`` (``rob.load_tuned``), for ``rob export``.

    The network sees a square: of training images random crops, of the others the whole image, whatever its shape, and what it
    finds is brought back to the image's size before it is compared. MisuseError: masks that cannot be, no labels, one class, a
    class of ``val`` that ``train`` lacks, settings of another run. FailureError: the loss stopped being a number.
    """
    progress = progress or TuneProgress()
    start = start_of(config)
    train, val = open_segmentation(config.train), open_segmentation(config.val)
    for sentence in (*train.left_out, *val.left_out):
        progress.note(sentence)
    counts = train.counts()
    val = val.with_classes_of(train, counts)
    present = [name for name, pixels in zip(train.classes, counts.tolist(), strict=True) if pixels]
    if len(present) < 2:
        raise MisuseError(
            f"{config.train} has pixels of one class, {present[0]!r}: a segmenter tells two or more apart"
        )
    info = replace(start.info, image_size=config.size or start.info.image_size)
    model = Segmenter(start.backbone, len(train.classes), config.channels).to(start.device)
    facts = {"classes": train.classes, "train_fingerprint": fingerprint(train), "val_fingerprint": fingerprint(val)}
    with tuning_folder(config, "segment", start, facts) as kept:
        weights = config.out / TASKS["segment"].file
        steps = max(1, len(train) // config.batch_size)

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = (tensor.to(start.device) for tensor in batch)
            # A crop may show nothing but what is ignored: the mean over nothing would be no number.
            losses = F.cross_entropy(model(images), labels, ignore_index=IGNORED, reduction="sum")
            return losses / (labels != IGNORED).sum().clamp_min(1)

        training = training_of(
            config, start, model, steps, lambda epoch: training_batches(train, info, config, epoch, steps), loss
        )

        def validate() -> dict[str, float]:
            found = score_of(model, val, info, start.device, progress)
            return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}

        if (config.out / "result.json").exists() and kept.checkpoint.exists():
            progress.note(f"{config.out} is complete already: its result is shown; `overwrite` trains anew")
        trained = train_epochs(training, validate, kept, progress.train, lambda h: write_history(config.out, h))
        assert trained.best is not None
        score = score_of(model.eval(), val, info, start.device, progress)
        save_tuned(model, Tuned("segment", info.to_dict(), train.classes, {"channels": config.channels}), weights)
        result = SegmentResult(weights, info.name, score, trained.best, config.epochs, len(train), len(val))
        write_outcome(config.out, {"task": "segment", "init": config.init, **result.to_json()})
    return result


def fingerprint(data: SegmentationData) -> str:
    """sha256 (hex) of names, sizes of files and masks: another set, or another labelling, is another run."""
    digest = hashlib.sha256(repr(data.classes).encode())
    for row, image in enumerate(data.images):
        digest.update(f"{image.name} {image.stat().st_size}\n".encode())
        digest.update(data.labels(row).tobytes())
    return digest.hexdigest()


class Crops(Dataset):
    """Item i: image (3, S, S) float32 as the network takes it, labels (S, S) int64; cropped, mirrored and coloured by
    ``seed``, the epoch and i alone."""

    def __init__(self, data: SegmentationData, info: StudentInfo, config: SegmentConfig, epoch: int) -> None:
        self.data, self.seed, self.epoch = data, config.seed, epoch
        side, strength = (info.image_size, info.image_size), config.colour
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(side, (config.crop, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(config.flip),
                v2.ColorJitter(strength, strength, strength),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                v2.Normalize(info.mean, info.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image = tv_tensors.Image(torch.from_numpy(self.data.image(row)).permute(2, 0, 1))
        labels = tv_tensors.Mask(torch.from_numpy(self.data.labels(row)))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would keep the seed for a GPU, too, with the stack that it came from.
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + self.epoch) * 1_000_003 + row) % 2**64)
            images, masks = self.transform(image, labels)
        return images.as_subclass(Tensor), masks.as_subclass(Tensor)


def training_batches(
    data: SegmentationData, info: StudentInfo, config: SegmentConfig, epoch: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches in this epoch's order: images (B, 3, S, S), labels (B, S, S)."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data), generator=generator)[: steps * config.batch_size].tolist()
    needed = 12 * info.image_size**2 * config.batch_size * (2 * config.workers + 2)
    return iter(
        DataLoader(
            Subset(Crops(data, info, config, epoch), order),
            config.batch_size,
            num_workers=config.workers if shared_memory_holds(needed) else 0,
            generator=torch.Generator(),
        )
    )


@torch.no_grad()
def score_of(
    model: nn.Module, data: SegmentationData, info: StudentInfo, device: torch.device, progress: TuneProgress
) -> SegmentationScore:
    """Of all images, each seen whole and compared at its own size."""
    confusion = Confusion(len(data.classes), device)
    for row in range(len(data)):
        labels = torch.from_numpy(data.labels(row)).to(device)
        logits = model(whole_image(data.image(row), info).to(device))
        found = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        confusion.add(found, labels)
        progress.test(row + 1, len(data))
    return confusion.score(data.classes)


def whole_image(pixels: Any, info: StudentInfo) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, S, S) float32, squeezed into the square and normalised."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    side = [info.image_size, info.image_size]
    resized = v2.functional.resize(image, side, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.normalize(resized.float() / 255, list(info.mean), list(info.std))[None]
