"""The prototype cross-entropy of RoB, DINO, SwAV, MSN and iBOT, from embeddings and prototypes."""

from torch import Tensor

from . import reference
from .target import Target

IMPLS = ("auto", "reference")


def prototype_cross_entropy(
    student_embedding: Tensor,
    student_prototypes: Tensor,
    target: Target,
    *,
    student_temp: float,
    teacher_temp: float,
    centre: Tensor | None = None,
    pair_weights: Tensor,
    impl: str = "auto",
) -> Tensor:
    """sum_{v,g} pair_weights[v,g] * mean_b H(q[b,g], p[b,v])."""
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; known: {', '.join(IMPLS)}")
    return reference.prototype_cross_entropy(
        student_embedding,
        student_prototypes,
        target,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        centre=centre,
        pair_weights=pair_weights,
    )
