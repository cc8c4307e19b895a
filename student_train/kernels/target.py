"""The three forms in which a target reaches the loss.

B images, G target views an image, D dimensions, K prototypes. The target of a view is
``q = softmax((t - centre) / teacher_temp)`` over the teacher's K logits ``t``. None of the forms holds q, so temperature
and centre stay free until the loss is called. Targets never receive a gradient.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


class _Target:
    """What the three forms share. ``_per_image`` names the fields whose first axis is the image."""

    _per_image: ClassVar[tuple[str, ...]]

    @property
    def device(self) -> torch.device:
        return getattr(self, self._per_image[0]).device

    @property
    def num_images(self) -> int:
        return getattr(self, self._per_image[0]).shape[0]

    @property
    def num_views(self) -> int:
        """G, the target views an image."""
        return getattr(self, self._per_image[0]).shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same target on ``device``, dtypes kept."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items()})  # type: ignore[type-var]

    @property
    def rows(self) -> Self:
        """Every view as an image of its own: B * G images of one view; views of the same memory."""
        return replace(self, **{name: getattr(self, name).flatten(0, 1)[:, None] for name in self._per_image})  # type: ignore[type-var]

    def images(self, start: int, stop: int) -> Self:
        """The target of images ``start`` to ``stop``; views of the same memory."""
        return replace(self, **{name: getattr(self, name)[start:stop] for name in self._per_image})  # type: ignore[type-var]

    def take(self, images: Tensor) -> Self:
        """The target of some images, by number (n,) int64 on its device."""
        return replace(self, **{name: getattr(self, name).index_select(0, images) for name in self._per_image})  # type: ignore[type-var]

    def views(self, start: int, stop: int) -> Self:
        """The target of target views ``start`` to ``stop``; views of the same memory."""
        return replace(self, **{name: getattr(self, name)[:, start:stop] for name in self._per_image})  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class EmbeddingTarget(_Target):
    """The teacher's projected embedding and its prototypes: ``t = embedding @ prototypes.T``, recomputed inside the loss.

    embedding: (B, G, D) float, already L2-normalised if the teacher does so. D may differ from the student's.
    prototypes: (K, D) float, the effective rows (weight norm applied); None where only embeddings are compared.
    """

    embedding: Tensor
    prototypes: Tensor | None = None
    _per_image: ClassVar[tuple[str, ...]] = ("embedding",)

    def __post_init__(self):
        rows, matrix = self.embedding.shape, None if self.prototypes is None else self.prototypes.shape
        if len(rows) != 3 or (matrix is not None and (len(matrix) != 2 or rows[2] != matrix[1])):
            given = tuple(rows), None if matrix is None else tuple(matrix)
            raise ValueError(
                "EmbeddingTarget needs embedding (B, G, D) and prototypes (K, D), got {} and {}".format(*given)
            )

    @property
    def matrix(self) -> Tensor:
        """The prototypes, for what cannot do without. ValueError: there are none."""
        if self.prototypes is None:
            raise ValueError("an EmbeddingTarget without prototypes has no logits")
        return self.prototypes

    @property
    def num_prototypes(self) -> int:
        """K; 0 without prototypes."""
        return 0 if self.prototypes is None else len(self.prototypes)


@dataclass(frozen=True, eq=False)
class TopKTarget(_Target):
    """The k largest logits of every view, and how much the others weigh.

    ids: (B, G, k) integer, distinct prototype ids in [0, K).
    logits: (B, G, k) float, the teacher's logits at ``ids``.
    tail: (B, G, T) float, log-sum-exp of the K - k other logits divided by each of ``temps``; not read when k == K.
    temps: T floats, the ladder of temperatures, positive and distinct.
    num_prototypes: K.
    """

    ids: Tensor
    logits: Tensor
    tail: Tensor
    temps: tuple[float, ...]
    num_prototypes: int
    _per_image: ClassVar[tuple[str, ...]] = ("ids", "logits", "tail")

    def __post_init__(self):
        if (
            self.ids.ndim != 3
            or self.logits.shape != self.ids.shape
            or self.tail.shape != (*self.ids.shape[:2], len(self.temps))
            or not 0 < self.ids.shape[2] <= self.num_prototypes
        ):
            raise ValueError(
                "TopKTarget needs ids and logits (B, G, k), tail (B, G, T) and T temps with k <= num_prototypes, got "
                f"{tuple(self.ids.shape)}, {tuple(self.logits.shape)}, {tuple(self.tail.shape)}, "
                f"{len(self.temps)} and {self.num_prototypes} prototypes"
            )


@dataclass(frozen=True, eq=False)
class DenseTarget(_Target):
    """All the teacher's logits. logits: (B, G, K) float. A logit of -inf is a prototype that the target excludes."""

    logits: Tensor
    _per_image: ClassVar[tuple[str, ...]] = ("logits",)

    def __post_init__(self):
        if self.logits.ndim != 3:
            raise ValueError(f"DenseTarget needs logits (B, G, K), got {tuple(self.logits.shape)}")

    @property
    def num_prototypes(self) -> int:
        return self.logits.shape[2]


Target = EmbeddingTarget | TopKTarget | DenseTarget


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
