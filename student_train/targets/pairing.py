"""Which of the teacher's views meets which of the student's, in one epoch.

``same``   the student sees the very views whose targets were cached, each against its own target (DisCo, embedding regression);
           what it sees besides, fresh in every epoch, meets every target (RoB as released: with G targets and L local crops,
           eye(G) over ones(L, G));
``cross``  a target never meets its own view (DINO, SwAV). The student sees fresh views of every image in every epoch, so that V
           cached targets teach unlimited views; with ``fresh=False`` it sees the targets' own crops, as published;
``all``    the student sees the cached views and every pair counts.

All pairs weigh alike, unless ``global_weight`` divides them. Local crops are fresh in every epoch, whatever the pairing, and so
are the student's global crops beyond the targets (``step_globals``). ``same`` suits a cache best: what is replayed is exact, what
is fresh costs no target. It has local crops where they are asked for.
"""

import torch
from torch import Tensor

from ...common.errors import MisuseError
from ...common.views.drawing import LOCAL
from ...common.views.recipes import Recipe
from ..config import PairingChoice, PairingConfig
from ..objectives import OBJECTIVES
from .view_plan import ViewPlan


def choose_pairing(
    objective: str, recipe: Recipe, views: int, choice: PairingChoice | None = None, from_student: bool = False
) -> PairingConfig:
    """What the ``choice`` leaves open as the objective's paper has it.

    ``views`` is what the branch has of an image: where it has fewer than the paper uses in a step, all of them are used. Targets
    ``from_student`` are of the very crops that the student sees, unless ``fresh`` gives each its own. Local crops, and the weight
    of the pairs without one, are the recipe's. MisuseError: settings that contradict each other.
    """
    paper, choice = OBJECTIVES[objective], choice or PairingChoice()
    pairing, fresh = choice.pairing or paper.pairing, choice.fresh
    if fresh is not None and pairing in ("same", "all"):
        raise MisuseError(f"`fresh` is for `pairing` cross: {pairing} always replays the cached views, leave it out")
    if from_student and fresh is None and pairing == "cross":
        fresh = False
    # Replayed, a lone global crop would meet no target.
    usual_targets = max(2, paper.target_views) if fresh is False else paper.target_views
    num_local = choice.num_local
    if num_local is None:
        num_local = 0 if pairing == "same" else recipe.num_local
    global_weight = recipe.global_weight if choice.global_weight is None and num_local else choice.global_weight
    step_targets = choice.step_targets or min(usual_targets, views)
    step_globals = choice.step_globals
    if step_globals is None and not from_student and step_targets < (paper.global_views or 0):
        step_globals = paper.global_views
    chosen = PairingConfig(pairing, step_targets, num_local, fresh is not False, global_weight, step_globals)
    return check_pairing(objective, chosen)


def check_pairing(objective: str, config: PairingConfig) -> PairingConfig:
    """The same. MisuseError: the objective's paper has no other views than the same of both branches, and these are others."""
    paper = OBJECTIVES[objective]
    if paper.only_pairing and config.pairing != paper.pairing:
        raise MisuseError(
            f"`objective` {objective} compares the {paper.pairing} views: leave out `pairing`, or use embedding or moco"
        )
    if paper.only_pairing and (config.num_local or config.step_globals):
        raise MisuseError(
            f"`objective` {objective} compares the {paper.pairing} views alone: leave out `num_local` and `step_globals`"
        )
    return config


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
    replayed = targets[: config.num_global] if config.replays else ()
    fresh = range(len(replayed), config.num_global)
    globals_ = replayed + tuple(cached_views + epoch * config.num_global + v for v in fresh)
    locals_ = tuple(LOCAL + epoch * config.num_local + i for i in range(config.num_local))
    return ViewPlan(targets, globals_, locals_, _pair_weights(config, targets, globals_, locals_), epoch)


def _pair_weights(
    config: PairingConfig, targets: tuple[int, ...], globals_: tuple[int, ...], locals_: tuple[int, ...]
) -> Tensor:
    meets = {
        "same": lambda v, t: v == t or v not in targets,
        "cross": lambda v, t: v != t,
        "all": lambda v, t: True,
    }[config.pairing]
    weights = torch.tensor([[float(meets(v, t)) for t in targets] for v in globals_ + locals_])
    if config.global_weight is not None and locals_:
        with_global, with_local = weights[: len(globals_)], weights[len(globals_) :]
        with_global *= config.global_weight / with_global.sum().clamp(min=1)
        with_local *= (1 - config.global_weight) / with_local.sum()
    return weights / weights.sum()
