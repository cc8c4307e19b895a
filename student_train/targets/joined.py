"""What a step's targets are where those of several branches come together."""

from dataclasses import dataclass

from ..kernels.target import EmbeddingTarget, Target
from .dense import TargetWithPatches


@dataclass(frozen=True, eq=False)
class PairTarget:
    """Of B images. ``frozen``: the teacher's G target views. ``moving``: the copy's embedding (B, G', D) of the student's own G'
    global crops, in their order, and its prototypes where it has some.
    """

    frozen: Target
    moving: EmbeddingTarget


@dataclass(frozen=True, eq=False)
class EnsembleTarget:
    """Of B images, what each of several teachers says of the same G target views."""

    members: tuple[Target, ...]


AnyTarget = Target | PairTarget | EnsembleTarget | TargetWithPatches
"""What a student is trained against in a step."""
