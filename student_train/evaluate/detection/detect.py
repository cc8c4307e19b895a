"""Detection: a detector on the student, trained on boxes (and masks) and tested by average precision."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection import FasterRCNN

from ....common.errors import MisuseError
from ....common.files import locked, replacing
from ....common.run import pick_device, seed_everything
from ....common.shared_memory import shared_memory_holds
from ....common.weights import hash_weights
from ...checkpoint import load_student
from ...epochs import Kept, Training, train_epochs
from ...finetune.tuned import Tuned, save_tuned
from ...optimiser import may_fuse, warm_cosine
from ...students import create_student
from ..config import DetectConfig
from .data import DetectionData, DetectionTensors, open_detection
from .model import build_detector
from .score import AveragePrecision, average_precision, precision_by_class


@dataclass(frozen=True)
class DetectResult:
    """``mask`` is None where the data have no masks."""

    student: str
    init: str
    box: AveragePrecision
    mask: AveragePrecision | None
    per_class: dict[str, float | None]
    """Box AP of each class in percent."""
    num_train: int
    num_test: int
    weights: str
    """What ``hash_weights`` says of the student that training started from, or that gave its architecture alone."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DetectProgress:
    """``train`` gets (steps done, all steps, text), ``test`` (images done, all)."""

    train: Callable[[int, int, str], None] = lambda done, total, text: None
    test: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None


def detect(config: DetectConfig, keep_in: Path | None = None, progress: DetectProgress | None = None) -> DetectResult:
    """Train on ``config.train``, test on ``config.test`` once, at the end: the last epoch, or with ``config.val`` the one of the
    highest box AP there.

    With ``keep_in`` a run folder, its ``eval`` folder takes a checkpoint an epoch, from which a killed run goes on, the
    detections in COCO's form, and the detector (``rob.load_tuned``). MisuseError: settings, data or a student that cannot be.
    FailureError: the loss stopped being a number.
    """
    progress = progress or DetectProgress()
    device = pick_device(config.device)
    train = open_detection(config.data, config.train)
    test = open_detection(config.data, config.test).with_classes_of(train)
    val = open_detection(config.data, config.val).with_classes_of(train) if config.val else None
    for data in (train, test, *([val] if val else [])):
        for sentence in data.left_out:
            progress.note(sentence)
        if data is not train:
            DetectionTensors(data, masks=False).check_sizes()  # not only after the training
    backbone, info = load_student(config.run)
    source = hash_weights(backbone.state_dict())
    seed_everything(config.seed)
    if config.init == "random":
        backbone = create_student(info)
    masks = train.has_masks and test.has_masks
    detector = build_detector(
        backbone, info, len(train.classes), masks=masks, side=config.side, channels=config.channels
    ).to(device)

    task = "detect" if config.init == "student" else f"detect-{config.init}"
    checkpoint = keep_in and keep_in / "eval" / f"{task}.checkpoint.pt"
    trained = keep_in and keep_in / "eval" / f"{task}.safetensors"
    is_done = trained and trained.exists() and checkpoint and not checkpoint.exists()
    if is_done and not config.overwrite:  # of hours, maybe on other images
        raise MisuseError(f"{trained} is there already: pass `overwrite` to train another one, or give another `out`")
    free = ("run", "data", "test", "workers", "device", "overwrite")
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    settings |= {"weights": source, "classes": train.classes, "masks": masks}
    settings |= {"train_fingerprint": hashlib.sha256(json.dumps(train.to_coco(), sort_keys=True).encode()).hexdigest()}
    taken = f"{checkpoint}: another rob eval detect is at work on this run; wait for it, or give another `out`"
    with locked(checkpoint.with_suffix(".lock"), taken) if checkpoint else nullcontext():
        validate = None if val is None else lambda: {"ap": _box_ap(detector, val, device, progress)}
        fit(detector, train, masks, config, device, checkpoint, settings, progress, validate)

    found = find(detector, test, masks, device, progress)
    truth = test.to_coco()
    box, by_class = precision_by_class(truth, found)
    result = DetectResult(
        info.name,
        config.init,
        box,
        average_precision(truth, found, "segm") if masks else None,
        {name: by_class.get(name) for name in train.classes},
        len(train.images),
        len(test.images),
        source,
    )
    if trained:
        with replacing(trained.parent / "detections" / f"{task}.json") as file:
            file.write(json.dumps(found).encode())
        head: dict[str, int | bool] = {"masks": masks, "side": config.side, "channels": config.channels}
        tuned = Tuned("detect", info.to_dict(), train.classes, head)
        save_tuned(detector, tuned, trained)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return result


def fit(
    detector: FasterRCNN,
    data: DetectionData,
    masks: bool,
    config: DetectConfig,
    device: torch.device,
    checkpoint: Path | None,
    settings: dict[str, Any],
    progress: DetectProgress,
    validate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train in place, or go on from ``checkpoint``."""
    steps = -(-len(data.images) // config.batch_size)

    def loss(batch: tuple[tuple[Tensor, ...], tuple[dict[str, Any], ...]]) -> Tensor:
        images, targets = batch
        losses = detector([image.to(device) for image in images], [_to(target, device) for target in targets])
        return torch.stack(list(losses.values())).sum()

    training = Training(
        model=detector.train(),
        optimiser=torch.optim.AdamW(
            detector.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=may_fuse(detector)
        ),
        batches=lambda epoch: _training_batches(data, masks, config, epoch),
        loss=loss,
        rate=warm_cosine(config.epochs * steps),
        epochs=config.epochs,
        steps_per_epoch=steps,
        device=device,
        clip=1.0,
    )
    train_epochs(training, validate, Kept(checkpoint, settings) if checkpoint else None, progress.train)


def _box_ap(detector: FasterRCNN, data: DetectionData, device: torch.device, progress: DetectProgress) -> float:
    return average_precision(data.to_coco(), find(detector, data, False, device, progress)).ap or 0.0


@torch.no_grad()
def find(
    detector: FasterRCNN, data: DetectionData, masks: bool, device: torch.device, progress: DetectProgress
) -> list[dict[str, Any]]:
    """Everything the detector finds, as COCO's result records (100 of an image at most)."""
    detector.eval()
    found = []
    images = DetectionTensors(data, masks=False)
    for index in range(len(images)):
        image, target = images[index]
        (output,) = detector([image.to(device)])
        if masks:
            output["masks"] = output["masks"] > 0.5  # a byte a pixel to fetch in the place of four
        output = {name: values.cpu() for name, values in output.items() if masks or name != "masks"}
        for number, box in enumerate(output["boxes"].tolist()):
            left, top, right, bottom = box
            record = {
                "image_id": target["image_id"],
                "category_id": data.category(int(output["labels"][number])),
                "bbox": [left, top, right - left, bottom - top],
                "score": float(output["scores"][number]),
            }
            if masks:
                record["segmentation"] = _pack(output["masks"][number, 0])
            found.append(record)
        progress.test(index + 1, len(images))
    return found


def _training_batches(
    data: DetectionData, masks: bool, config: DetectConfig, epoch: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[dict[str, Any], ...]]]:
    """Images in this epoch's order, half of them mirrored; the last batch may be short."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.images), generator=generator).tolist()
    flips = torch.rand(len(order), generator=generator) < 0.5
    images = Subset(DetectionTensors(data, masks, flips), order)
    needed = 4 * 3 * max(i["width"] * i["height"] for i in data.images) * config.batch_size * (2 * config.workers + 2)
    # A DataLoader draws a seed for its workers: from a generator of its own, so that a resumed run draws the same.
    return iter(
        DataLoader(
            images,
            config.batch_size,
            num_workers=config.workers if shared_memory_holds(needed) else 0,
            collate_fn=_columns,
            generator=torch.Generator(),
        )
    )


def _columns(items: list[tuple[Tensor, dict[str, Any]]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(zip(*items, strict=True))


def _to(target: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in target.items() if isinstance(value, Tensor)}


def _pack(mask: Tensor) -> dict[str, Any]:
    packed: Any = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": packed["size"], "counts": packed["counts"].decode()}
