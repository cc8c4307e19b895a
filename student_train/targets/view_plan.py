"""The views of one epoch."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ViewPlan:
    """The view ids of one epoch: ``targets`` (G), the student's ``globals`` and ``locals`` (V together). Globals that are
    targets' own views come first, in the targets' order."""

    targets: tuple[int, ...]
    globals: tuple[int, ...]
    locals: tuple[int, ...]
    pair_weights: Tensor
    """(V, G) float32, global crops first, summing to 1."""
    epoch: int = 0

    @property
    def num_replayed(self) -> int:
        """How many of the globals, the first ones, are the views of as many targets, the first ones too."""
        return sum(mine == theirs for mine, theirs in zip(self.globals, self.targets, strict=False))
