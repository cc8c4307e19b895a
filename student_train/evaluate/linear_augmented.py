"""Linear evaluation as DINO's ``eval_linear.py`` does it: SGD on the features of random crops and flips, network frozen.

Unlike there, the rates and decays of a sweep are trained side by side, the choice among them is made on a validation
part, and features are standardised, so that a rate means the same for every network.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ...common.files import locked
from ...common.images.beton import Beton
from ...common.views.loader import LoaderConfig
from ..checkpoint import load_checkpoint, save_checkpoint
from .crops import RandomCrops
from .features import Features, same_classes
from .labelled import LabelledImages
from .linear import HeadSweep, LinearConfig, LinearHeads, LinearResult, choose_and_test, split_validation
from .network import FrozenNetwork


def linear_augmented(
    network: FrozenNetwork,
    train: LabelledImages,
    test: Features,
    config: LinearConfig,
    loader: LoaderConfig,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LinearResult:
    """``linear`` on random crops of ``train``'s images; their centred features serve to standardise and to choose.

    With ``checkpoint`` a killed run goes on from its last epoch, and the file is removed at the end. MisuseError as
    ``linear``, and for a checkpoint of other settings.
    """
    device = network.device
    train = replace(train, features=train.features.to(device))
    test = same_classes(train.features, test.to(device))
    rows, held_out = split_validation(train.features, config)
    again = checkpoint and checkpoint.with_name(f"refit-{checkpoint.name}")

    def refit(chosen: LinearConfig) -> LinearHeads:
        return train_on_crops(network, train, chosen, loader, again, progress)

    taken = (
        f"{checkpoint}: another rob eval linear --augment is at work on this run; wait for it, or give another `out`"
    )
    with locked(checkpoint.with_suffix(".lock"), taken) if checkpoint else nullcontext():
        heads = train_on_crops(network, train.rows(rows), config, loader, checkpoint, progress)
        result = choose_and_test(heads, train.features.rows(held_out), test, config, len(rows), refit)
        for path in (checkpoint, again):
            if path:
                path.unlink(missing_ok=True)
    return result


def train_on_crops(
    network: FrozenNetwork,
    images: LabelledImages,
    config: LinearConfig,
    loader: LoaderConfig,
    checkpoint: Path | None,
    progress: Callable[[int, int], None] | None,
) -> LinearHeads:
    """``train_heads`` on random crops of ``images``, whose features are on the network's device."""
    data = Beton(images.path)
    settings = {**asdict(config), "loader": asdict(loader), **network.settings}
    settings |= {"data_fingerprint": data.manifest.fingerprint, "num_images": len(images.image_ids)}
    settings |= {"labels": data.labels_hash}
    sweep = HeadSweep(images.features, config)
    first = 0
    if checkpoint and checkpoint.exists():
        state = load_checkpoint(checkpoint, settings, network.device)
        sweep.load_state_dict(state["heads"])
        first = state["epoch"]

    labels = images.labels_by_id().to(network.device)
    crops = RandomCrops(network, data, replace(loader, batch_size=config.batch_size), config.seed)
    for epoch in range(first, config.epochs):
        for image_ids, views in crops.epoch(images.image_ids, epoch):
            with torch.no_grad():
                features = network.embed(views).float()
            sweep.step(sweep.standardise(features), labels[image_ids.to(network.device)])
        if checkpoint:
            save_checkpoint(checkpoint, {"heads": sweep.state_dict(), "epoch": epoch + 1}, settings)
        if progress:
            progress(epoch + 1, config.epochs)
    return sweep.heads()
