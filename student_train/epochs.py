"""Training on labels, epoch by epoch: kept after each, so that a killed run goes on, and the best one remembered."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..common.errors import FailureError
from ..common.run import autocast, seed_step
from .checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from .optimiser import clip_gradients

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Training(Generic[Batch]):
    """What is trained, and how. ``rate`` (step from 0, epoch) is a factor on the rate that each group of ``optimiser`` has now.

    With a ``seed``, what a step draws depends on it and the step alone. ``precision`` is one of ``common.run``.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    batches: Callable[[int], Iterable[Batch]]
    """Epoch -> its ``steps_per_epoch`` batches."""
    loss: Callable[[Batch], Tensor]
    rate: Callable[[int, int], float]
    epochs: int
    steps_per_epoch: int
    device: torch.device
    precision: str = "fp32"
    clip: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Kept:
    """A checkpoint, and the settings without which it is of another run."""

    checkpoint: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """``history``: of each epoch its mean loss, and what ``validate`` found. ``best`` is the number of the epoch, from 1, whose
    weights the model has; None where there was no validation."""

    history: tuple[dict[str, float], ...]
    best: int | None


def train_epochs(
    training: Training[Batch],
    validate: Callable[[], dict[str, float]] | None = None,
    kept: Kept | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    after_epoch: Callable[[list[dict[str, float]]], None] = lambda history: None,
) -> Trained:
    """Train in place, or go on from ``kept``. Modules stay in the mode, training or not, that they come in.

    ``validate`` is called after every epoch with the model in eval mode; the model ends with the weights of the epoch whose
    first value is highest, the first of equals. FailureError: the loss is no number, or the checkpoint is of another rob.
    """
    model, optimiser = training.model, training.optimiser
    modes = [(module, module.training) for module in model.modules()]
    rates = [group["lr"] for group in optimiser.param_groups]
    scaler = torch.amp.GradScaler(training.device.type, enabled=training.precision == "fp16")
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "scaler": scaler}
    parameters = list(model.parameters())
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {}
    if kept and kept.checkpoint.exists():
        saved = load_checkpoint(kept.checkpoint, kept.settings)
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            restore_random_state(saved["random"])
            history, best = list(saved["history"]), saved["best"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise FailureError(f"{kept.checkpoint} is of another rob: delete it to start afresh") from error
    total = training.epochs * training.steps_per_epoch
    for epoch in range(len(history), training.epochs):
        losses = []
        for number, batch in enumerate(training.batches(epoch)):
            step = epoch * training.steps_per_epoch + number
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * training.rate(step, epoch)
            if training.seed is not None:
                seed_step(training.seed, 0, step)
            with autocast(training.device, training.precision):
                loss = training.loss(batch)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            if training.clip is not None:
                scaler.unscale_(optimiser)
                clip_gradients(parameters, training.clip)
            scaler.step(optimiser)
            scaler.update()
            losses.append(loss.item())  # a GPU is waited for here alone, with the whole step under way
            if not isfinite(losses[-1]):
                raise FailureError(f"step {step + 1}: the loss is {losses[-1]:g}; lower `lr`")
            progress(step + 1, total, f"loss {losses[-1]:.3f}")
        found = {"loss": sum(losses) / len(losses)}
        if validate:
            model.eval()
            with torch.no_grad():
                scores = validate()
            for module, mode in modes:
                module.training = mode
            found |= scores
            score = next(iter(scores.values()))
            if not best or score > best["score"]:
                tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                best = {"score": score, "epoch": epoch + 1, "tensors": tensors}
        history.append(found)
        if kept:
            states = {name: part.state_dict() for name, part in parts.items()}
            more = {"random": random_state(), "history": history, "best": best}
            save_checkpoint(kept.checkpoint, states | more, kept.settings)
        after_epoch(history)
    if best:
        model.load_state_dict(best["tensors"])
    return Trained(tuple(history), best.get("epoch"))
