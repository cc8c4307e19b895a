"""RoB on iBOT's class token (2301.09451 on 2111.07832, eq. 1): DINO's loss, against iBOT's class-token prototypes.

    L = sum_{v,g} w[v,g] mean_b H( softmax((t[b,g] - c) / tau_t), softmax(s[b,v] / tau_s) )

iBOT's other half, the loss of masked patches, is left out: it needs a target a patch, which no store keeps, and a student
that is a ViT. Temperatures, head (no BatchNorm in iBOT's ViTs: ``head_norm`` False), its start and centre are DINO's; RoB's
``head_type`` "mlp" is D-2048-GELU-2048-GELU-K.
"""

from .prototypes import PrototypeObjective
from .without_teacher import CopySettings


class IbotObjective(PrototypeObjective, name="ibot"):
    """iBOT's class-token loss."""

    options = PrototypeObjective.options | {"norm_last_layer"}
    usual_head = "teacher"
    mlp_layers = 3
    mlp_activation = "gelu"
    joined_norm = True
    published = CopySettings(prototypes=8192, warmup_teacher_temp_epochs=30, centre="running", freeze_prototypes=1)
