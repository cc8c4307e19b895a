"""RoB on MSN (2301.09451 on 2204.07141): sharpened targets; alone also balanced, and a student that must use all prototypes.

    L = sum_{v,g} w[v,g] mean_b H( sharpen(softmax(t[b,g] / .1)), softmax(s[b,v] / tau_s) )
    without a teacher:
    L = sum_{v,g} w[v,g] mean_b H( Sinkhorn(sharpen(softmax(t[b,g] / .1))), softmax(s[b,v] / tau_s) )
        + m (log K - H(mean_{b,v} softmax(s[b,v] / tau_s)))
    sharpen(p)_k = p_k^(1 / T) / sum_j p_j^(1 / T)

t and s are cosines with unit prototypes (frozen ones of another method's teacher keep their lengths). Sharpening a softmax is a
softmax at T times its temperature: T = .25 makes .1 a teacher temperature of .025, which is what MSN's teachers have here.
Sinkhorn starts from those probabilities, 3 rounds over all ranks (``msn_train.py``); m is 1. With a frozen teacher there is
neither, and two target views, as RoB released it. Both drop .15 of the patches of a ViT's global crops (``patch_drop``; RoB .1
of ViT-Tiny's, as its preset), and the head's BatchNorm of MSN's own code sees each crop size apart (``norm_by_size``). The paper
has one target view an image against one further global and ten local crops.
"""

from .prototypes import PrototypeObjective
from .without_teacher import CopySettings


class MsnObjective(PrototypeObjective, name="msn"):
    """MSN's head, targets and mean-entropy term."""

    unit_prototypes = True
    sinkhorn_start = "probabilities"
    sinkhorn_alone = "batch"
    mean_entropy_alone = 1.0
    patch_drop = 0.15
    joined_norm = True
    published = CopySettings(
        prototypes=1024, teacher_temp=0.025, linear_momentum=True, momentum_runs=1.25, own_prototypes=True
    )
