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

from ...common.errors import MisuseError, unknown_name
from ...common.views.drawing import LOCAL
from ...common.views.recipes import Recipe
from ..objectives import OBJECTIVES

PAIRINGS = ("same", "cross", "all")


@dataclass(frozen=True)
class PairingConfig:
    """``step_targets`` target views of every image in a step, against as many global crops and ``num_local`` local crops.

    ``fresh`` (cross only): the student's global crops are new in every epoch instead of the target's own.
    ``global_weight`` is alpha of SSLight (2210.02808): the weight of the pairs of a target with a global crop, the local crops
    having the rest; None weighs all pairs alike, as DINO does.
    """

    pairing: str = "cross"
    step_targets: int = 2
    num_local: int = 0
    fresh: bool = True
    global_weight: float | None = None

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise unknown_name("pairing", self.pairing, PAIRINGS)
        if self.step_targets < 1 or self.num_local < 0:
            raise MisuseError(
                f"a step needs at least 1 target view and 0 local crops, got {self.step_targets} and {self.num_local}"
            )
        if self.pairing == "same" and self.num_local:
            raise MisuseError(
                "`pairing` same has no target for a local crop: use `num_local` 0, or `pairing` all or cross"
            )
        if self.pairing == "cross" and not self.fresh and self.step_targets + self.num_local < 2:
            raise MisuseError(
                "`pairing` cross of one view with itself leaves no pair: use 2 target views, local or fresh crops"
            )
        if self.global_weight is None:
            return
        if not 0.0 <= self.global_weight <= 1.0:
            raise MisuseError(f"the weight of global pairs is {self.global_weight}, expected a value from 0 to 1")
        if not self.num_local:
            raise MisuseError(
                "`global_weight` is against local crops, and there are none: leave it out, or use `num_local`"
            )
        if self.global_weight == 1 and self.pairing == "cross" and not self.fresh and self.step_targets == 1:
            raise MisuseError(
                "`global_weight` 1 leaves no pair: one view meets only local crops, which then weigh nothing"
            )


def choose_pairing(
    objective: str,
    recipe: Recipe,
    views: int,
    pairing: str | None = None,
    step_targets: int | None = None,
    num_local: int | None = None,
    fresh: bool | None = None,
    global_weight: float | None = None,
) -> PairingConfig:
    """What is not said (None) as the objective's paper has it.

    ``views`` is what the branch has of an image: where it has fewer than the paper uses in a step, all of them are used.
    Local crops, and the weight of the pairs without one, are the recipe's. MisuseError: options that contradict each other.
    """
    paper = OBJECTIVES[objective]
    pairing = pairing or paper.pairing
    if paper.only_pairing and pairing != paper.pairing:
        raise MisuseError(
            f"`objective` {objective} compares the {paper.pairing} views: leave out `pairing`, or use embedding or moco"
        )
    if fresh is not None and pairing in ("same", "all"):
        raise MisuseError(f"`fresh` is for `pairing` cross: {pairing} always replays the cached views, leave it out")
    # Replayed, a lone global crop would meet no target.
    step_targets = step_targets or min(max(2, paper.target_views) if fresh is False else paper.target_views, views)
    if num_local is None:
        num_local = 0 if pairing == "same" else recipe.num_local
    if global_weight is None and num_local:
        global_weight = recipe.global_weight
    return PairingConfig(pairing, step_targets, num_local, True if fresh is None else fresh, global_weight)


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
    if config.step_targets > cached_views:
        raise MisuseError(
            f"the cache holds {cached_views} views of an image and a step uses {config.step_targets}: "
            f"pass `step_targets` {cached_views}, or cache more with rob cache-teacher --views {config.step_targets}"
        )
    targets = tuple((epoch * config.step_targets + t) % cached_views for t in range(config.step_targets))
    fresh = config.pairing == "cross" and config.fresh
    globals_ = (
        tuple(cached_views + epoch * config.step_targets + t for t in range(config.step_targets)) if fresh else targets
    )
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
