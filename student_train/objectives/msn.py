"""RoB on MSN (2301.09451 on 2204.07141): sharpened, balanced targets, and a student that must use all prototypes.

    L = sum_{v,g} w[v,g] mean_b H( Sinkhorn(sharpen(softmax(t[b,g] / .1))), softmax(s[b,v] / tau_s) )
        + m (log K - H(mean_{b,v} softmax(s[b,v] / tau_s)))
    sharpen(p)_k = p_k^(1 / T) / sum_j p_j^(1 / T)

t and s are cosines with unit prototypes. Sharpening a softmax is a softmax at T times its temperature: T = .25 makes .1 a
teacher temperature of .025, which is what MSN's teachers have here. Sinkhorn starts from those probabilities, 3 rounds over
all ranks (``msn_train.py``); m is 1. The paper drops patches of the student's global crops (``patch_drop``), and its head's
BatchNorm sees each crop size apart (``norm_by_size``). It has one target view an image against one further global and ten
local crops. RoB as released has neither Sinkhorn nor m, and two targets.
"""

from .prototypes import PrototypeObjective
from .without_teacher import CopySettings


class MsnObjective(PrototypeObjective, name="msn"):
    """MSN's head, targets and mean-entropy term."""

    unit_prototypes = True
    sinkhorn_start = "probabilities"
    sinkhorn = "batch"
    mean_entropy = 1.0
    target_views = 1
    published = CopySettings(
        prototypes=1024, teacher_temp=0.025, linear_momentum=True, momentum_runs=1.25, own_prototypes=True
    )
