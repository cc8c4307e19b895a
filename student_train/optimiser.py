"""The optimiser, its per-step schedule and the averaged student: timm's, set up as self-supervised recipes do."""

from collections.abc import Callable, Iterable, Sequence
from math import cos, pi
from typing import Any, Protocol, runtime_checkable

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from ..common.errors import MisuseError
from .config import OptimiserConfig

TIMM_NAMES = {"adamw": "adamw", "sgd": "momentum", "lars": "lars"}
"""Our names and timm's. timm's own "sgd" is Nesterov's; the published recipes use plain momentum."""

LR_BATCH_SIZE = 256
"""Images a step that ``OptimiserConfig.lr`` is quoted for, as in DINO, SwAV, MoCo-v2 and SSLight."""


def build_optimiser(model: nn.Module, config: OptimiserConfig, batch_size: int, fused: bool = False) -> Optimizer:
    """The optimiser over ``model``'s trainable parameters; ``batch_size`` is images a step over all ranks. ``fused``: AdamW
    as one kernel, on a GPU or a CPU (``may_fuse``).

    What ``decayed_groups`` does not decay gets no adaptive rate from LARS; with ``config.decay_all`` all is decayed.
    MisuseError: LARS with no weight decay, a ``trust`` that is not LARS's or not above 0.
    """
    if config.name == "lars" and config.weight_decay == 0:
        raise MisuseError("lars adapts only the layers that have weight decay: give it one above 0, such as 1e-6")
    if config.trust is not None and config.name != "lars":
        raise MisuseError(f"`trust` is for `optimiser` lars, and it is {config.name}: leave it out")
    if config.trust is not None and config.trust <= 0:
        raise MisuseError(f"`trust` is {config.trust:g}, expected a value above 0, such as 0.001 or 0.02")
    # A decay of 0 at the start would mark no group as one that decays.
    weight_decay = config.weight_decay or config.weight_decay_end or 0.0
    if config.decay_all:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "weight_decay": weight_decay}]
    else:
        groups = decayed_groups(model, weight_decay)
    lr = config.peak * batch_size / LR_BATCH_SIZE
    of_lars: dict[str, Any] = {} if config.trust is None else {"trust_coeff": config.trust}
    of_adamw: dict[str, Any] = {"fused": True} if fused and config.name == "adamw" else {}
    return create_optimizer_v2(groups, TIMM_NAMES[config.name], lr=lr, momentum=config.momentum, **of_lars, **of_adamw)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: biases, norms and what a backbone lists in ``no_weight_decay()`` (position embeddings) are not
    decayed, the others are."""
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_no_weight_decay(model))


def may_fuse(model: nn.Module, precision: str = "fp32") -> bool:
    """Whether AdamW may be one kernel for the parameters of ``model``. Not with fp16, where it would take the scaler's verdict on
    the device, and whether a step was skipped would stay unknown here."""
    found = ((parameter.device.type, parameter.is_floating_point()) for parameter in model.parameters())
    return precision != "fp16" and set(found) <= {("cuda", True), ("cpu", True)}


class Schedule:
    """Learning rate (linear warm-up, then cosine) and weight decay (cosine) as functions of the step alone.

    ``step(t)`` sets both before step ``t`` (from 0) of ``total_steps``; resuming is calling it with a later ``t``.
    MisuseError: a warm-up that fills the whole run.
    """

    def __init__(self, optimiser: Optimizer, config: OptimiserConfig, steps_per_epoch: int, epochs: int) -> None:
        self.optimiser = optimiser
        self.config = config
        self.total_steps = steps_per_epoch * epochs
        warmup = config.warmup(epochs)
        warmup_steps = round(steps_per_epoch * warmup)
        peak = optimiser.param_groups[0]["lr"]
        if warmup_steps >= self.total_steps:
            raise MisuseError(
                f"`warmup_epochs` {warmup:g} leave nothing of a run of `epochs` {epochs}: take less, a tenth of them is usual"
            )
        self._decayed = [i for i, group in enumerate(optimiser.param_groups) if group["weight_decay"] > 0]
        self._cosine = CosineLRScheduler(
            optimiser,
            t_initial=max(2, self.total_steps - warmup_steps),  # of 1 timm warns, and its rate is the same
            lr_min=config.min_lr,
            warmup_t=warmup_steps,
            warmup_lr_init=min(config.warmup_lr or 0.0, peak),  # that of a small batch may be below it
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def step(self, step: int) -> float:
        """Set learning rate and weight decay for ``step``; returns the learning rate."""
        self._cosine.step_update(step)
        if self.config.weight_decay_end is not None:
            weight_decay = self.weight_decay(step)
            for number in self._decayed:
                self.optimiser.param_groups[number]["weight_decay"] = weight_decay
        return self.optimiser.param_groups[0]["lr"]

    def weight_decay(self, step: int) -> float:
        start, end = self.config.weight_decay, self.config.weight_decay_end
        if end is None:
            return start
        return end + (start - end) * cosine_decay(step, self.total_steps)


def cosine_decay(step: float, total: float) -> float:
    """From 1 at step 0 to 0 at ``total``, along half a cosine."""
    return 0.5 * (1 + cos(pi * step / total))


def warm_cosine(total: int) -> Callable[[int, int], float]:
    """A linear warm-up over a tenth of the steps, 500 at most, and a cosine to 0."""
    warmup = min(500, total // 10)
    return lambda step, epoch: (step + 1) / warmup if step < warmup else cosine_decay(step - warmup, total - warmup)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, each: bool = False) -> Tensor:
    """Scale gradients down to a norm of ``limit``: that of all together, or ``each`` parameter's own, as DINO's
    ``utils.clip_gradients``. The norm of all together as it was, a scalar that nothing waits for.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not each:
        norm = nn.utils.get_total_norm(gradients)
        # A norm that is small enough leaves them alone; torch multiplies by 1 then, which spares a GPU the wait for the answer.
        if norm.device.type != "cpu" or not norm + 1e-6 <= limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (limit / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()


def build_average(student: nn.Module, decay: float) -> ModelEmaV3:
    """The running average of ``student``'s weights: ``.update(student, step)`` after a step, ``.module`` to evaluate.

    The decay grows to ``decay`` as 1 - step^(-2/3), so that the average of a short run holds no random weights.
    """
    return ModelEmaV3(student, decay=decay, use_warmup=True)


@runtime_checkable
class _NamesUndecayed(Protocol):
    """timm's way of saying which parameters of a backbone should not decay."""

    def no_weight_decay(self) -> Iterable[str]: ...


def _no_weight_decay(model: nn.Module) -> list[str]:
    """Full names of the parameters that the backbones inside ``model`` ask not to decay."""
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, _NamesUndecayed):
            names += [f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()]
    return names
