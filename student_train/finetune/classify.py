"""A student becomes a classifier: trained on labels, the best epoch by validation kept."""

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.images.beton import Beton
from ...common.views.loader import LoaderConfig, check_loader, resolve_loader
from ...common.views.recipes import Crop, Recipe
from ..epochs import train_epochs
from ..evaluate.crops import RandomCrops
from ..evaluate.features import Features, extract_features, labels_alone, same_classes
from ..evaluate.logistic import fit_logistic
from ..evaluate.network import FrozenNetwork
from ..own_student import OwnClassifier
from ..students import check_input_size
from .config import ClassifyConfig
from .folder import (
    TuneProgress,
    start_of,
    training_of,
    tuning_folder,
    write_history,
    write_outcome,
)
from .tuned import TASKS, Tuned, build_classifier, save_tuned

LINEAR_IMAGES = 20_000
"""At most so many images, the first of a packed file, whose order is random, say where the classifier begins."""
LINEAR_REGULARISATION = 1e-1
"""Of logistic regression on standardised features, where the classifier begins."""
JITTER: dict[str, Any] = {"jitter": 0.8, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05}
CROPS = {
    "light": Crop(224, (0.5, 1.0)),
    "medium": Crop(224, (0.25, 1.0), **JITTER),
    "heavy": Crop(224, (0.08, 1.0), **JITTER, grey=0.1),
}
HEAVY = {"mixup": 0.2, "cutmix": 1.0, "erase": 0.25}


@dataclass(frozen=True)
class ClassifyResult:
    """``top1`` and ``per_class`` in percent of the validation images, with the weights of ``best_epoch``."""

    weights: Path
    student: str
    top1: float
    per_class: dict[str, float | None]
    best_epoch: int
    epochs: int
    num_train: int
    num_val: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "weights": self.weights.name}


def finetune_classifier(config: ClassifyConfig, progress: TuneProgress | None = None) -> ClassifyResult:
    """Train, or go on in ``config.out``, which ends with ``classifier.safetensors`` (``rob.load_tuned``), for ``rob export``.

    It begins with logistic regression on the frozen features ("LP-FT", Kumar et al. 2022): behind a random classifier the first
    steps would ruin them. MisuseError: no labels, one class, a class of ``val`` that ``train`` lacks, settings of another run.
    FailureError: the loss stopped being a number.
    """
    progress = progress or TuneProgress()
    start = start_of(config)
    loader = resolve_loader(config.loader, start.device)
    check_loader(loader, start.device)
    train, val = labels_alone(config.train), labels_alone(config.val)
    val = same_classes(train, val)
    classes = train.classes or tuple(map(str, range(train.num_classes)))
    if len(train.labels.unique()) < 2:
        raise MisuseError(
            f"{config.train} has one class, {train.class_name(int(train.labels[0]))}: a classifier tells two or more apart"
        )
    info = replace(start.info, image_size=config.size or start.info.image_size)
    check_input_size(start.backbone, info.image_size)
    data, tested = Beton(config.train), Beton(config.val)
    if tested.manifest.fingerprint == data.manifest.fingerprint:
        progress.note(
            f"{config.val} holds the very images of {config.train}: the accuracies and the best epoch say nothing of other images"
        )
    facts = {
        "classes": classes,
        "train_fingerprint": data.manifest.fingerprint,
        "val_fingerprint": tested.manifest.fingerprint,
        "train_labels": data.labels_hash,
        "val_labels": tested.labels_hash,
    }
    with tuning_folder(config, "classify", start, facts) as kept:
        weights = config.out / TASKS["classify"].file
        done = config.out / "result.json"
        network = FrozenNetwork(
            info.name,
            start.backbone.to(start.device).eval(),
            info.image_size,
            info.mean,
            info.std,
            start.source,
            start.device,
        )
        model = build_classifier(info, len(classes), {}).to(start.device)
        body = model.backbone if isinstance(model, OwnClassifier) else model
        body.load_state_dict(start.backbone.state_dict(), strict=False)
        if config.init == "student" and not kept.checkpoint.exists():
            begin_with_regression(model, network, data, train, loader)
        # The last images, which fill no batch, wait for another epoch.
        steps = max(1, data.num_images // loader.batch_size)
        crops, ids = views_of(config, network, data, loader), torch.arange(data.num_images)
        mix, labels = Mixing(config, len(classes), start.device), train.labels.to(start.device)

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            images, targets = mix(batch[1], labels[batch[0].to(start.device)])
            return F.cross_entropy(
                model(images), targets, label_smoothing=0.0 if targets.ndim > 1 else config.smoothing
            )

        training = training_of(config, start, model, steps, lambda epoch: islice(crops.epoch(ids, epoch), steps), loss)

        def validate() -> dict[str, float]:
            found = predictions(model, network, tested, loader, progress)
            return {"top1": 100 * (found == val.labels).double().mean().item()}

        if done.exists() and weights.exists() and kept.checkpoint.exists():
            progress.note(f"{config.out} is complete already: its result is shown; `overwrite` trains anew")
        trained = train_epochs(training, validate, kept, progress.train, lambda h: write_history(config.out, h))
        assert trained.best is not None
        found = predictions(model.eval(), network, tested, loader, progress)
        per_class = {
            name: 100 * (found[val.labels == number] == number).double().mean().item()
            if (val.labels == number).any()
            else None
            for number, name in enumerate(classes)
        }
        save_tuned(model, Tuned("classify", info.to_dict(), classes, {}), weights)
        top1 = 100 * (found == val.labels).double().mean().item()
        result = ClassifyResult(weights, info.name, top1, per_class, trained.best, config.epochs, len(train), len(val))
        write_outcome(config.out, {"task": "classify", "init": config.init, **result.to_json()})
    return result


def begin_with_regression(
    model: nn.Module, network: FrozenNetwork, data: Beton, labels: Features, loader: LoaderConfig
) -> None:
    """Put logistic regression on the frozen features into the classifier: of standardised ones, whose mean and deviation become
    part of its weights. A classifier that is no one linear layer is left as it is."""
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        return
    rows = min(data.num_images, LINEAR_IMAGES)
    features = extract_features(network.embed, network.centred(data, loader, np.arange(rows)), 0, rows)
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    standardised = Features((features - mean) / deviation, labels.labels[:rows], labels.classes).to(network.device)
    found = fit_logistic(standardised, LINEAR_REGULARISATION, max_iterations=200)
    weights = (found.weights.cpu() / deviation.double()[:, None]).T
    with torch.no_grad():
        columns = weights.shape[0]  # without names there may be fewer, where the last classes are rare
        head.weight[:columns].copy_(weights)
        head.bias[:columns].copy_(found.biases.cpu() - weights @ mean.double())


def views_of(config: ClassifyConfig, network: FrozenNetwork, data: Beton, loader: LoaderConfig) -> RandomCrops:
    """Crops, flips and colours, drawn anew every epoch."""
    crop = replace(CROPS[config.augment], flip=config.flip)
    recipe = Recipe("fine-tuning", (crop,), num_global=1, interpolation="bicubic")
    return RandomCrops(network, data, loader, config.seed, recipe)


class Mixing:
    """timm's random erasing, mixup and cutmix of a batch: images (B, 3, S, S) and labels (B,) to images and targets."""

    def __init__(self, config: ClassifyConfig, num_classes: int, device: torch.device) -> None:
        usual = HEAVY if config.augment == "heavy" else {}
        mixup = usual.get("mixup", 0.0) if config.mixup is None else config.mixup
        cutmix = usual.get("cutmix", 0.0) if config.cutmix is None else config.cutmix
        self.erase = RandomErasing(usual["erase"], mode="pixel", device=str(device)) if usual else None
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=config.smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.erase is not None:
            images = self.erase(images)
        pairs = len(images) // 2 * 2
        if self.mix is not None and pairs:  # timm mixes pairs: an odd image is left out
            return self.mix(images[:pairs], labels[:pairs])
        return images, labels


@torch.no_grad()
def predictions(
    model: nn.Module, network: FrozenNetwork, data: Beton, loader: LoaderConfig, progress: TuneProgress
) -> Tensor:
    """The class of the highest logit of every image, (N,) int64 by image id."""
    found = torch.full((data.num_images,), -1)
    done = 0
    for image_ids, images in network.centred(data, loader, np.arange(data.num_images)):
        found[image_ids] = model(images).argmax(1).cpu()
        done += len(image_ids)
        progress.test(done, data.num_images)
    return found
