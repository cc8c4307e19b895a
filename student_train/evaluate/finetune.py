"""Few labels, the whole network trained: from the frozen features' logistic regression, on random crops and flips."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.errors import FailureError, MisuseError
from ...common.files import replacing
from ...common.images.beton import Beton
from ...common.records import read_record, sealed
from ...common.views.loader import LoaderConfig
from ..epochs import Training, train_epochs
from ..optimiser import cosine_decay, may_fuse
from .config import FinetuneConfig
from .crops import RandomCrops
from .features import Features
from .labelled import LabelledImages
from .logistic import fit_logistic
from .lowshot import REGULARISATION, Listed, LowshotResult, Share
from .network import FrozenNetwork

HEAD_RATE = 10.0
"""The classifier's learning rate over the network's."""


class Classifier(nn.Module):
    """A network and logistic regression on its L2-normalised features."""

    def __init__(self, backbone: nn.Module, weights: Tensor, biases: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(weights.shape[0], weights.shape[1])
        with torch.no_grad():
            self.head.weight.copy_(weights.T)
            self.head.bias.copy_(biases)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.normalize(self.backbone(images)))


def finetune_lowshot(
    network: FrozenNetwork,
    train: LabelledImages,
    test: LabelledImages,
    config: FinetuneConfig,
    loader: LoaderConfig,
    share: Share | Listed,
    seeds: Sequence[int],
    keep_in: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LowshotResult:
    """``lowshot`` with the whole network trained. With ``keep_in`` each seed's outcome is kept in that folder, and a
    killed run goes on with the next seed. MisuseError as ``finetune``.
    """
    accuracies = []
    for seed in seeds:
        settings = {**asdict(config), **share.to_json(), "seed": seed, "loader": asdict(loader)}
        settings |= {**network.settings, "images": len(train.image_ids)}
        stored = [Beton(images.path) for images in (train, test)]
        settings |= {"data": [data.manifest.fingerprint for data in stored]}
        settings |= {"labels": [data.labels_hash for data in stored]}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        done = keep_in and keep_in / f"{digest[:16]}.json"
        top1 = done and _kept(done)
        if top1 is None:
            top1 = finetune(network, train, test, config, loader, share, seed)
            if done:
                with replacing(done) as file:
                    file.write(sealed({"top1": top1, **settings}))
        accuracies.append(top1)
        if progress:
            progress(len(accuracies), len(seeds))
    num_train = len(share.rows(train.features.labels, seeds[0]))
    return LowshotResult.of(share, seeds, accuracies, num_train, len(test.image_ids))


class Seed(TypedDict):
    top1: float


def _kept(path: Path) -> float | None:
    """None: there is none, or it is damaged."""
    try:
        return read_record(path, Seed, "")["top1"]
    except (OSError, FailureError):
        return None


def finetune(
    network: FrozenNetwork,
    train: LabelledImages,
    test: LabelledImages,
    config: FinetuneConfig,
    loader: LoaderConfig,
    share: Share | Listed,
    seed: int,
) -> float:
    """Top-1 in percent on ``test`` after training on ``share``'s images of ``seed``.

    It starts where ``lowshot`` ends ("LP-FT", Kumar et al. 2022): behind a random classifier, few labels would ruin the
    features. ``network`` is left as it was. MisuseError: it is no student, or as ``lowshot``.
    """
    subset = train.rows(share.rows(train.features.labels, seed))
    return _top1(fit_classifier(network, subset, config, loader, seed), network, test, loader)


def fit_classifier(
    network: FrozenNetwork, train: LabelledImages, config: FinetuneConfig, loader: LoaderConfig, seed: int
) -> Classifier:
    """A copy of ``network`` and a classifier on it, both trained on all of ``train``, in eval mode. MisuseError: it is no
    student."""
    if not isinstance(network.embed, nn.Module) or not any(p.requires_grad for p in network.embed.parameters()):
        raise MisuseError(f"{network.name} cannot be fine-tuned: give a run folder or a student's weights")
    frozen = train.features
    start = fit_logistic(Features(F.normalize(frozen.features), frozen.labels, frozen.classes), REGULARISATION)
    model = Classifier(copy.deepcopy(network.embed), start.weights, start.biases).to(network.device).train()
    # So few images make poor statistics: batch norm keeps those it was trained with.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()

    groups = [
        {"params": model.backbone.parameters(), "lr": config.lr},
        {"params": model.head.parameters(), "lr": HEAD_RATE * config.lr},
    ]
    labels = train.labels_by_id().to(network.device)
    crops = RandomCrops(network, Beton(train.path), loader, seed)
    training = Training(
        model=model,
        optimiser=torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=may_fuse(model)),
        batches=lambda epoch: crops.epoch(train.image_ids, epoch),
        loss=lambda batch: F.cross_entropy(model(batch[1]), labels[batch[0].to(network.device)]),
        rate=lambda step, epoch: cosine_decay(epoch, config.epochs),
        epochs=config.epochs,
        steps_per_epoch=-(-len(train.image_ids) // loader.batch_size),
        device=network.device,
    )
    train_epochs(training)
    return model.eval()


@torch.no_grad()
def _top1(model: nn.Module, network: FrozenNetwork, test: LabelledImages, loader: LoaderConfig) -> float:
    """Percent of the images of ``test`` that get their label."""
    labels = test.labels_by_id()
    batches = network.centred(Beton(test.path), loader, test.image_ids.numpy())
    hits = sum(int((model(images).argmax(1).cpu() == labels[ids]).sum()) for ids, images in batches)
    return 100 * hits / len(test.image_ids)
