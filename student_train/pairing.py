"""Which of the teacher's views meets which of the student's, in one epoch.

``same``   the student sees the very views whose targets were cached, each against its own target (DisCo, embedding regression);
``cross``  a target never meets its own view (DINO, SwAV). The student sees fresh views of every image in every epoch, so that V
           cached targets teach unlimited views; with ``fresh=False`` it sees the targets' own crops, as published;
``all``    the student sees the cached views and every pair counts.

Local crops are fresh in every epoch, whatever the pairing, except that ``same`` has none: no target shows them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import MisuseError, unknown_name
from ..common.views.drawing import LOCAL
from ..common.views.recipes import Recipe

PAIRINGS = ("same", "cross", "all")
SAME_VIEW = ("embedding", "disco")
"""Objectives whose papers compare the same view of both branches."""
ONE_TARGET = ("msn",)
"""Objectives whose papers have one target view of an image in a step."""


@dataclass(frozen=True)
class PairingConfig:
    """``targets`` target views of every image in a step, against as many global crops and ``num_local`` local crops.

    ``fresh`` (cross only): the student's global crops are new in every epoch instead of the target's own.
    ``global_weight`` is alpha of SSLight (2210.02808): the weight of the pairs of a target with a global crop, the local crops
    having the rest; None weighs all pairs alike, as DINO does.
    """

    pairing: str = "cross"
    targets: int = 2
    num_local: int = 0
    fresh: bool = True
    global_weight: float | None = None

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise unknown_name("pairing", self.pairing, PAIRINGS)
        if self.targets < 1 or self.num_local < 0:
            raise MisuseError(
                f"a step needs at least 1 target view and 0 local crops, got {self.targets} and {self.num_local}"
            )
        if self.pairing == "same" and self.num_local:
            raise MisuseError(
                "--pairing same has no target for a local crop: use --num-local 0, or --pairing all or cross"
            )
        if self.pairing == "cross" and not self.fresh and self.targets + self.num_local < 2:
            raise MisuseError(
                "--pairing cross of one view with itself leaves no pair: use 2 target views, local or fresh crops"
            )
        if self.global_weight is None:
            return
        if not 0.0 <= self.global_weight <= 1.0:
            raise MisuseError(f"the weight of global pairs is {self.global_weight}, expected a value from 0 to 1")
        if not self.num_local:
            raise MisuseError(
                "--global-weight is against local crops, and there are none: leave it out, or use --num-local"
            )
        if self.global_weight == 1 and self.pairing == "cross" and not self.fresh and self.targets == 1:
            raise MisuseError(
                "--global-weight 1 leaves no pair: one view meets only local crops, which then weigh nothing"
            )


def usual_pairing(objective: str) -> str:
    """The pairing of the objective's paper."""
    return "same" if objective in SAME_VIEW else "cross"


def choose_pairing(
    objective: str,
    recipe: Recipe,
    views: int,
    pairing: str | None = None,
    targets: int | None = None,
    num_local: int | None = None,
    fresh: bool | None = None,
    global_weight: float | None = None,
) -> PairingConfig:
    """What is not said (None) as the objective's paper has it: embedding regression and DisCo pair the same view, the
    others cross.

    ``views`` is what the branch has of an image; two of them are used in a step where there are two; MSN uses one beside fresh
    crops.
    Local crops, and the weight of the pairs without one, are the recipe's. MisuseError: options that contradict each other.
    """
    pairing = pairing or usual_pairing(objective)
    if objective == "disco" and pairing != "same":
        raise MisuseError("--objective disco compares the same views: leave out --pairing, or use embedding or moco")
    if fresh is not None and pairing in ("same", "all"):
        option = "--fresh" if fresh else "--replay"
        raise MisuseError(f"{option} is for --pairing cross: {pairing} always replays the cached views, leave it out")
    one = objective in ONE_TARGET and fresh is not False  # replayed, a lone global crop would meet no target
    targets = targets or min(1 if one else 2, views)
    if num_local is None:
        num_local = 0 if pairing == "same" else recipe.num_local
    if global_weight is None and num_local:
        global_weight = recipe.global_weight
    return PairingConfig(pairing, targets, num_local, True if fresh is None else fresh, global_weight)


@dataclass(frozen=True)
class ViewPlan:
    """The view ids of one epoch: ``targets`` (G), the student's ``globals`` and ``locals`` (V together)."""

    targets: tuple[int, ...]
    globals: tuple[int, ...]
    locals: tuple[int, ...]
    pair_weights: Tensor
    """(V, G) float32, global crops first, summing to 1."""


def plan_views(config: PairingConfig, cached_views: int, epoch: int) -> ViewPlan:
    """The views of ``epoch``: the targets rotate through the ``cached_views`` ids 0 .. V-1, what is fresh follows them.

    Raises MisuseError when the cache holds fewer views than a step uses.
    """
    if config.targets > cached_views:
        raise MisuseError(
            f"the cache holds {cached_views} views of an image and a step uses {config.targets}: "
            f"pass --step-targets {cached_views}, or cache more with rob cache-teacher --views {config.targets}"
        )
    targets = tuple((epoch * config.targets + t) % cached_views for t in range(config.targets))
    fresh = config.pairing == "cross" and config.fresh
    globals_ = tuple(cached_views + epoch * config.targets + t for t in range(config.targets)) if fresh else targets
    locals_ = tuple(LOCAL + epoch * config.num_local + i for i in range(config.num_local))
    return ViewPlan(targets, globals_, locals_, _pair_weights(config, targets, globals_, locals_))


def _pair_weights(
    config: PairingConfig, targets: tuple[int, ...], globals_: tuple[int, ...], locals_: tuple[int, ...]
) -> Tensor:
    meets = {"same": lambda v, t: v == t, "cross": lambda v, t: v != t, "all": lambda v, t: True}[config.pairing]
    weights = torch.tensor([[float(meets(v, t)) for t in targets] for v in globals_ + locals_])
    if config.global_weight is not None and locals_:
        with_global, with_local = weights[: len(globals_)], weights[len(globals_) :]
        with_global *= config.global_weight / with_global.sum().clamp(min=1)
        with_local *= (1 - config.global_weight) / with_local.sum()
    return weights / weights.sum()
