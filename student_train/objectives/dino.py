"""RoB on DINO (2301.09451 on 2104.14294): cross-entropy between the teacher's and the student's distribution over prototypes.

    L = sum_{v,g} w[v,g] mean_b H( softmax((t[b,g] - c) / tau_t), softmax(s[b,v] / tau_s) )

Head: D-2048-2048-256 with GELU, unit rows, K weight-normed prototypes; tau_s .1. DINO's centre c is ``centre_targets``
"checkpoint" or "running"; DINOv2 and DINOv3 put ``sinkhorn`` "batch" in its place, over all views of the batch together.
The student's prototypes start at the teacher's: best of all objectives for both students of benchmarks/claims.py.
"""

from .prototypes import PrototypeObjective
from .without_teacher import CopySettings


class DinoObjective(PrototypeObjective, name="dino"):
    """DINO's head on the student, and the prototype cross-entropy against the teacher."""

    options = PrototypeObjective.options | {"norm_last_layer"}
    usual_head = "teacher"
    joined_norm = True
    norm_in_vits = False
    # K as SSLight has it for small CNNs; for ViTs it and DINO have 65536. Without a centre all images of a fresh head end at one
    # prototype.
    published = CopySettings(prototypes=4096, warmup_teacher_temp_epochs=50, centre="running", freeze_prototypes=1)
