"""RoB on SwAV (2301.09451 on 2006.09882): the student predicts the codes that Sinkhorn-Knopp makes of the teacher's logits.

    L = sum_{v,g} w[v,g] mean_b H( q[b,g], softmax(s[b,v] / tau_s) )
    q[:, g] = the rows of Sinkhorn(exp(t[:, g] / eps)) that belong to the batch, 3 rounds, prototypes first

eps stands where others have a teacher temperature (SwAV's teachers: .05, RoB .03), tau_s is .1. With a frozen teacher, as RoB
released it, codes are of the batch alone, and one view is the target of all crops, of which two are global; with
``sinkhorn_iterations`` 0 the codes are softmax(t / eps), for teachers that SwAV did not train.

Without a teacher, as ``main_swav.py``: each target view's batch is balanced apart, with a queue of 3840 earlier rows of that
view, which begins to fill in epoch 15 and is in use once it is full (``sinkhorn`` "queue"): a batch smaller than K cannot be
spread evenly without. A frozen teacher's rows serve at once. Head: D-2048(BN, ReLU)-128; prototypes normalised in place before
every step, unless they are a teacher's and frozen, or ``norm_last_layer`` is False: RoB's code has the normalisation as a hook
of SwAV's own loss alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.target import Target
from .objective import ObjectiveContext
from .prototypes import PrototypeObjective
from .without_teacher import CopySettings


class SwavObjective(PrototypeObjective, name="swav"):
    """SwAV's head, and the cross-entropy against balanced codes."""

    options = PrototypeObjective.options | {"norm_last_layer"}
    num_layers = 2
    activation = "relu"
    bottleneck = 128
    weight_norm = False
    unit_prototypes = True
    sinkhorn_by_view = True
    sinkhorn = "batch"
    sinkhorn_alone = "queue"
    target_views, global_views = 1, 2
    joined_norm = True
    published = CopySettings(
        prototypes=3000, copy_momentum=None, teacher_temp=0.05, queue_from_epoch=15, freeze_prototypes=1
    )

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        as_they_are = self.prototypes.bias is not None or context.config.head == "frozen"  # of an MLP, or the teacher's
        self.keeps_lengths = not as_they_are and context.config.norm_last_layer is not False

    def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
        if self.keeps_lengths:
            with torch.no_grad():
                self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        return super().forward(features, target, pair_weights)
