"""RoB on iBOT (2301.09451 on 2111.07832, eq. 1 to 3): DINO's loss of the class token, and the same of patches that were hidden.

    L = sum_{v,g} w[v,g] mean_b H( softmax((t[b,g] - c) / tau_t), softmax(s[b,v] / tau_s) )
      + lambda mean_{b,g} 1/|M[b,g]| sum_{p in M[b,g]} H( softmax((t[b,g,p] - c') / tau_t), softmax(s[b,g,p] / tau_s) )

M are the patches that are hidden from the student in its global crop (``masks``), never from the teacher; g is the same view for
both, and lambda is 1. A view of which nothing is hidden counts as 0, as released. Hidden patches go through the head of the class
token, and are rows like any others to the loss. Temperatures, head (no BatchNorm in ViTs'), its start
and centre are DINO's. c' is the patches' own (iBOT's ``center2``): where c is a running one c' <- .9 c' + .1 mean(t) over all
patches, hidden or not; where c is that of the teacher's file, the file's; else 0. RoB's ``head_type`` "mlp" is
D-2048-GELU-2048-GELU-K.

Without targets of patches (a store that has none; without a teacher, a student that is no ViT) it is the class token alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...common.errors import MisuseError
from ...common.store.encodings import check_temperature
from ...common.views.planes import moved
from ..kernels import prototype_cross_entropy
from ..targets.dense import Placement, TargetWithPatches
from .centre import FixedCentre, RunningCentre
from .objective import ObjectiveContext
from .prototypes import PrototypeObjective
from .without_teacher import CopySettings


class IbotObjective(PrototypeObjective, name="ibot"):
    """iBOT's loss: of the class token, and of hidden patches where there are targets of them."""

    options = PrototypeObjective.options | {"norm_last_layer", "patch_weight"}
    usual_head = "teacher"
    mlp_layers = 3
    mlp_activation = "gelu"
    joined_norm = True
    published = CopySettings(prototypes=8192, warmup_teacher_temp_epochs=30, centre="running", freeze_prototypes=1)
    patch_kinds = ("prototypes", "embedding", "student")

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        weight = 1.0 if context.config.patch_weight is None else context.config.patch_weight
        if not weight:
            return
        if context.space.patches is None:
            if context.config.patch_weight is not None:
                raise MisuseError(
                    f"`patch_weight` {weight:g}: these targets have no patches: cache with `patches` prototypes, or leave it out"
                )
            return
        if context.space.of_student and not (context.student_map and context.student_map.tokens):
            return  # a CNN, of which nothing can be hidden
        self._build_patches(context, weight)

    def _build_patches(self, context: ObjectiveContext, weight: float) -> None:
        space, student = context.space.patches, context.student_map
        assert space is not None
        alone = "or give `patch_weight` 0 for the class token alone"
        if space.kind not in self.patch_kinds:
            raise MisuseError(
                f"`objective` ibot reads prototypes of patches, and the store has `patches` {space.kind}: cache with `patches` "
                f"prototypes or embedding, {alone}"
            )
        assert student is not None
        if not student.tokens:
            raise MisuseError(
                f"`objective` ibot hides patches from the student, as a ViT has them and this one does not: take a ViT, {alone}"
            )
        if space.grid not in (0, student.side):
            raise MisuseError(
                f"`objective` ibot compares patch by patch, and the student has {student.side} x {student.side} of them "
                f"where the targets have {space.grid} x {space.grid}: choose `image_size` to fit, {alone}"
            )
        if space.num_prototypes != len(self.prototypes.matrix()):
            raise MisuseError(
                f"`objective` ibot has one head for class token and patches, and the teacher {space.num_prototypes} prototypes "
                f"of patches beside {len(self.prototypes.matrix())}: give `patch_weight` 0"
            )
        if space.ladder:
            check_temperature(space.ladder, self.teacher_temp, "patches")
        self.patch_weight, self.side = weight, student.side
        self.mask_token = nn.Parameter(torch.zeros(1, student.width))
        self.head_has_batchnorm = any(isinstance(layer, _BatchNorm) for layer in self.head.modules())
        if space.kind == "prototypes" and space.centre is not None and self.centre_targets == "checkpoint":
            raise MisuseError(
                "`centre_targets` checkpoint takes the patches' centre off their logits, and the store has those that were the "
                f"largest before: cache with `patches` embedding, or use `centre_targets` none, {alone}"
            )
        if not any(isinstance(centre, RunningCentre) for centre in self.centres):
            self.patch_centre = FixedCentre(space.centre if self.centre_targets == "checkpoint" else None)
        elif space.kind == "prototypes":
            raise MisuseError(
                "`centre_targets` running needs all logits of a patch, and the store has the largest alone: "
                f"cache with `patches` embedding, or use `centre_targets` none, {alone}"
            )
        else:
            self.patch_centre = RunningCentre(space.num_prototypes)

    def hidden_patches(self, placement: Placement) -> Tensor:
        return placement.masks(self.side)

    def patch_loss(self, maps: Sequence[Tensor], hidden: Tensor | None, target: TargetWithPatches) -> Tensor:
        """Of the global crops' patches that are ``hidden`` (on the CPU, so that they are counted without waiting for a GPU)."""
        assert hidden is not None
        views, targets = target.pooled.num_views, target.patches.rows
        assert target.placement.plan.num_replayed == views, "every target has its own view among the student's"
        centre = self.patch_centre(targets, self.teacher_temp)
        patches = maps[0][:, :views].flatten(3).mT.flatten(0, 2)  # (B * G * P, C)
        hidden = hidden[:, :views].flatten(2).double()
        weights = (hidden / hidden.sum(2, keepdim=True).clamp(min=1)).flatten()
        chosen = weights.nonzero()[:, 0]
        if not len(chosen):
            chosen = chosen.new_zeros(1)  # of weight 0: ranks that have some meet this one in the backward pass
        weights = weights[chosen] * len(chosen) / hidden[:, :, 0].numel()
        chosen = moved(chosen, patches.device)
        if self.head_has_batchnorm:  # which goes by all patches, as in iBOT's code
            said = self.head(patches).index_select(0, chosen)
        else:
            said = self.head(patches.index_select(0, chosen))
        return prototype_cross_entropy(
            said[:, None],
            self.prototypes.matrix(),
            targets.take(chosen),
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
            centre=centre,
            pair_weights=moved(weights.to(said.dtype), said.device).view(-1, 1, 1),
            student_bias=self.prototypes.bias,
            impl=self.loss_impl,
            check_finite=False,
        )
