"""Targets of several teachers at once: one store each, of the same images and views.

A view is replayed from the seed, so stores that were cached with one recipe and one seed have targets of the very same pixels:
what meets which view is decided once for all of them, and the loader draws as for one. A head for each teacher is the objective's
(``objectives.ensemble``).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import MisuseError
from ...common.views.batch import Batch
from .branch import RunContext, TargetBranch
from .cached import Cached, CachedTargets
from .joined import EnsembleTarget
from .pairing import ViewPlan

SAME = {"recipe": "recipe", "seed": "seed", "geometry": "resize path"}
"""What the views of all stores of an ensemble have in common, in the manifest's word and in words."""


@dataclass(frozen=True)
class Ensemble:
    """The stores of ``members``, two or more, whose losses have these ``weights``: shares of their sum; empty: equal ones."""

    members: tuple[Cached, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise MisuseError(
                f"an ensemble has two stores or more, and this one has {len(self.members)}: give `Cached`"
            )
        if self.weights and len(self.weights) != len(self.members):
            raise MisuseError(
                f"`targets_weight`: {len(self.weights)} weights for {len(self.members)} stores, give one for each of `targets`"
            )
        if not all(0 < weight < inf for weight in self.weights):
            told = ", ".join(f"{weight:g}" for weight in self.weights)
            raise MisuseError(
                f"`targets_weight` {told}: a weight is above 0 and a number, leave out a store that has none"
            )

    @property
    def stores(self) -> tuple[Path, ...]:
        return tuple(member.path for member in self.members)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the loss: the weights over their sum."""
        weights = self.weights or (1.0,) * len(self.members)
        return tuple(weight / sum(weights) for weight in weights)

    def open(self, run: RunContext) -> "EnsembleTargets":
        """MisuseError: the stores are not of the same images and views, or the objective reads patches, which are one store's."""
        members = tuple(member.open(run) for member in self.members)
        first = members[0]
        for member in members[1:]:
            for name, found in SAME.items():
                ours, theirs = getattr(member.store.manifest, name), getattr(first.store.manifest, name)
                if ours != theirs:
                    shown = "" if isinstance(ours, dict) else f" ({ours}, not {theirs})"
                    raise MisuseError(
                        f"{member.source} holds views of another {found}{shown} than {first.source}, and the stores of an "
                        "ensemble share theirs: cache one of them again with the other's `recipe`, `seed` and `loader`"
                    )
            if member.source == first.source:
                raise MisuseError(f"`targets` {member.source} is there twice: give one store for each teacher")
        if any(member.reads_patches for member in members):
            assert run.objective is not None
            raise MisuseError(
                f"`objective` {run.objective.name} reads patches, which are of one store, and `targets` are {len(members)}: give "
                "one, or `patch_weight` 0"
            )
        return EnsembleTargets(members, self.shares)


class EnsembleTargets(TargetBranch):
    """The branches of ``members`` as one. What is asked of a single store, such as how many prototypes it has, is answered for
    the one that says least: the first without prototypes, or the first."""

    kind = "cached"

    def __init__(self, members: tuple[CachedTargets, ...], shares: tuple[float, ...]) -> None:
        first, self.members = members[0], members
        self.recipe, self.seed, self.geometry = first.recipe, first.seed, first.geometry
        self.views = min(member.views for member in members)
        self.window_blocks = min(member.window_blocks for member in members)
        least = next((member.space for member in members if not member.space.num_prototypes), first.space)
        self.space = replace(least, members=tuple(zip(shares, (m.space for m in members), strict=True)))
        self.source = [str(member.store.place) for member in members]
        others: list[dict[str, Any]] = [member.description for member in members[1:]]
        self.description = first.description | {"views": self.views, "others": others, "shares": list(shares)}

    @contextmanager
    def targets(self, order: np.ndarray, batch_size: int, plan: ViewPlan) -> Iterator[Callable[..., EnsembleTarget]]:
        with ExitStack() as open_members:
            each = [open_members.enter_context(m.targets(order, batch_size, plan)) for m in self.members]

            def target(batch: Batch, crops=()) -> EnsembleTarget:
                return EnsembleTarget(tuple(target(batch, crops) for target in each))  # type: ignore[arg-type]

            yield target
