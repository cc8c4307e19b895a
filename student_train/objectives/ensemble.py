"""Several teachers at once: an objective for each, with a head of its own over the same features.

    L = sum_i share[i] * L_i        with shares that sum to 1

Each L_i is what it would be alone: temperature, centre, Sinkhorn and queue are its own teacher's.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..targets.joined import EnsembleTarget
from .objective import Objective, ObjectiveContext


class EnsembleObjective(Objective):
    """``members``: the objective of ``context.config`` for each of ``context.space.members``."""

    def __init__(self, context: ObjectiveContext, members: Sequence[Objective]) -> None:
        super().__init__(context)
        self.shares = [share for share, _ in context.space.members]
        self.members = nn.ModuleList(members)
        first = members[0]
        self.joined_norm = first.joined_norm  # type: ignore[misc]
        self.norm_by_size, self.sinkhorn, self.mean_entropy = first.norm_by_size, first.sinkhorn, first.mean_entropy

    @property
    def _each(self) -> list[Objective]:
        return list(self.members)  # type: ignore[arg-type]

    @property
    def prototype_weights(self) -> list[nn.Parameter]:
        return [weights for member in self._each for weights in member.prototype_weights]

    def forward(self, features: Tensor, target: EnsembleTarget, pair_weights: Tensor) -> Tensor:  # type: ignore[override]
        """features (B, V, F), the members' targets of G views an image, pair_weights (V, G). What is found of the targets is of
        the first's."""
        losses = []
        for member, share, own in zip(self._each, self.shares, target.members, strict=True):
            member.watching, member.views_by_size = self.watching, self.views_by_size
            losses.append(share * member(features, own, pair_weights))
        self.targets_found = self._each[0].targets_found
        return sum(losses[1:], losses[0])
