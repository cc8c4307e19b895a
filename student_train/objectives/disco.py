"""DisCo (2104.09124, section 3): MoCo-v2's contrast and the consistency of the final embedding, on both views.

    L = InfoNCE + a sum_g mean_b || z_s[b,g] - z_t[b,g] ||^2
    InfoNCE = mean over g != v of ``moco``'s loss of the student's view v against the teacher's key of view g

Student and teacher see the same views x_g (two of them in the paper), so that each term has its pairs. The student's head
is D-2048-ReLU to the teacher's dimension: the wide hidden layer is the paper's answer to the "distilling bottleneck".
``--only-consistency`` drops InfoNCE (the published ``--only-mse``).

Against the published code: the squared distances are summed over the batch there, so that their weight follows the batch of
a GPU (32 with its commands: a = 32), and here averaged; the keys are the teacher's, its branch being the one that replaces
the other, where DisCo keeps a momentum copy of the student beside the teacher; and the teacher stays in eval mode, where the
published training puts its BatchNorm in train mode.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...common.errors import MisuseError
from ..kernels.target import Target
from .embedding import consistency
from .moco import MocoObjective, info_nce
from .prototypes import given

if TYPE_CHECKING:
    from ..branches import TargetSpace
    from . import ObjectiveConfig


class DiscoObjective(MocoObjective):
    """InfoNCE and consistency, for ``--pairing same``."""

    options = MocoObjective.options | {"only_consistency", "consistency_weight"}

    def __init__(
        self,
        config: "ObjectiveConfig",
        num_features: int,
        space: "TargetSpace",
        targets: int = 2,
        num_images: int | None = None,
    ) -> None:
        """As ``build_objective``."""
        super().__init__(config, num_features, space, targets, num_images)
        self.only_consistency = bool(config.only_consistency)
        self.consistency_weight = given(config.consistency_weight, 1.0)
        if self.only_consistency:
            for option, value in {"--queue": config.queue, "--student-temp": config.student_temp}.items():
                if value is not None:
                    raise MisuseError(
                        f"{option} is InfoNCE's, and --only-consistency leaves that out: leave {option} out"
                    )
            del self.queue

    def forward(self, features: Tensor, target: Target, pair_weights: Tensor) -> Tensor:
        """features (B, G, F) of the target's own G views; pair_weights (G, G) is diagonal."""
        embedding, keys = self.embed(features), self.wanted(target)
        views = target.num_views
        loss = self.consistency_weight * views * consistency(embedding, keys, pair_weights)
        if not self.only_consistency:
            other = 1 - torch.eye(views, device=keys.device) if views > 1 else pair_weights
            loss = loss + info_nce(embedding, keys, self.queue.rows, self.student_temp, other / other.sum())
            self.queue.push(keys)
        return loss
