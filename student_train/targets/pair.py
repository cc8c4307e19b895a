"""What a step's targets are where a teacher's and a copy's come together."""

from dataclasses import dataclass

from ..kernels.target import EmbeddingTarget, Target


@dataclass(frozen=True, eq=False)
class PairTarget:
    """Of B images. ``frozen``: the teacher's G target views. ``moving``: the copy's embedding (B, G', D) of the student's own G'
    global crops, in their order, and its prototypes where it has some.
    """

    frozen: Target
    moving: EmbeddingTarget
