"""DisCo (2104.09124, section 3): MoCo-v2's contrast and the consistency of the final embedding, on both views.

    L = InfoNCE + a sum_g mean_b || z_s[b,g] - z_t[b,g] ||^2

    with a copy of the student beside the teacher (``--with-copy``), as published:
    InfoNCE = ``moco``'s loss of the student's view 0, the query, against the copy's key of view 1, which then joins the queue
    with the teacher alone:
    InfoNCE = mean over g != v of ``moco``'s loss of the student's view v against the teacher's key of view g

Student and teacher see the same views x_g (two of them in the paper), so that each term has its pairs. The student's head
is D-2048-ReLU to the teacher's dimension: the wide hidden layer is the paper's answer to the "distilling bottleneck".
``only_consistency`` drops InfoNCE (the published ``--only-mse``).

Against the published code: the squared distances are summed over the batch there, so that their weight follows the batch of
a GPU (32 with its commands: a = 32), and here averaged; and the teacher stays in eval mode, where the published training puts its
BatchNorm in train mode. The copy's BatchNorm sees both views of the batch, there the key's alone.
"""

import torch
from torch import Tensor

from ...common.errors import MisuseError
from ..kernels.target import Target
from ..targets.joined import PairTarget
from .embedding import consistency
from .moco import MocoObjective, info_nce
from .objective import ObjectiveContext
from .without_teacher import CopySettings


class DiscoObjective(MocoObjective, name="disco"):
    """InfoNCE and consistency, of the same views."""

    options = MocoObjective.options | {"only_consistency", "consistency_weight"}
    pairing, only_pairing, published = "same", True, None
    beside_teacher = CopySettings(copy_momentum=0.999, momentum_end=0.999)

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        config = context.config
        self.consistency_weight = 1.0 if config.consistency_weight is None else config.consistency_weight
        if config.only_consistency:
            for option, value in {"queue": config.queue, "student_temp": config.student_temp}.items():
                if value is not None:
                    raise MisuseError(
                        f"`{option}` is InfoNCE's, and `only_consistency` leaves that out: leave `{option}` out"
                    )
            if context.space.has_copy:
                raise MisuseError(
                    "`with_copy` is for InfoNCE's keys, and `only_consistency` leaves InfoNCE out: leave one out"
                )
            self.queue = None

    def forward(self, features: Tensor, target: Target | PairTarget | None, pair_weights: Tensor) -> Tensor:
        """features (B, G, F) of the target's own G views; pair_weights (G, G) is diagonal."""
        copy = None
        if isinstance(target, PairTarget):
            target, copy = target.frozen, target.moving
        queries = self.embed(features)
        keys = self.wanted(target)
        views = keys.shape[1]
        loss = self.consistency_weight * views * consistency(queries, keys, pair_weights)
        if self.queue is None:
            return loss
        other = 1 - torch.eye(views, device=keys.device) if views > 1 else pair_weights
        if copy is not None:  # the first view asks, the others answer; a lone one both
            first = min(1, views - 1)
            queries, keys, other = queries[:, :1], copy.embedding[:, first:], other[:1, first:]
        loss = loss + info_nce(queries, keys, self.queue.rows, self.student_temp, other / other.sum())
        self.queue.push(keys)
        return loss
