"""RoB on DINO (2301.09451 on 2104.14294): cross-entropy between the teacher's and the student's distribution over prototypes.

    L = sum_{v,g} w[v,g] * mean_b H( softmax((t[b,g] - c) / tau_t), softmax(s[b,v] / tau_s) )

The student has the teacher's K prototypes in number only: its head and its prototypes start fresh. How RoB treats the centre and
the pairing is not public: both are switches.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.heads import ProjectionHead, Prototypes
from ..kernels.prototype_ce import prototype_cross_entropy
from ..kernels.target import Target

if TYPE_CHECKING:
    from ..branches import TargetSpace
    from . import ObjectiveConfig


class DinoObjective(nn.Module):
    """DINO's head on the student, and the prototype cross-entropy against the teacher."""

    centre: Tensor | None

    def __init__(self, config: "ObjectiveConfig", num_features: int, space: "TargetSpace") -> None:
        super().__init__()
        if not space.num_prototypes:
            raise MisuseError(
                "--objective dino needs prototype logits, but the teacher has no head: "
                "fit prototypes on its cached embeddings with rob cache-teacher --prototypes K"
            )
        teacher_temp = config.teacher_temp or space.teacher_temp
        if teacher_temp is None:
            raise MisuseError("the teacher has no temperature of its own: pass --teacher-temp (0.04 to 0.1)")
        if config.centre and space.centre is None:
            raise MisuseError(
                "--centre-targets needs the teacher's mean logits, which this target does not have: leave it out"
            )
        self.student_temp, self.teacher_temp = config.student_temp, teacher_temp
        self.loss_impl = config.loss_impl
        self.head = ProjectionHead(
            num_features, config.hidden_dim, config.bottleneck, num_layers=3, norm=config.head_norm
        )
        self.prototypes = Prototypes(space.num_prototypes, config.bottleneck)
        self.register_buffer("centre", space.centre if config.centre else None, persistent=False)

    def forward(self, features: Tensor, target: Target, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target of G views an image; pair_weights (V, G)."""
        embedding = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return prototype_cross_entropy(
            embedding,
            self.prototypes.matrix(),
            target,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
            centre=self.centre,
            pair_weights=pair_weights,
            impl=self.loss_impl,
            check_finite=False,  # the run does, for every objective
        )
