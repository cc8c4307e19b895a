"""What RoB's objectives over prototypes share: the student's head, and the cross-entropy against the teacher's distribution.

    L = sum_{v,g} w[v,g] mean_b H(q[b,g], p[b,v]) + m (log K - H(mean_{b,v} p[b,v]))
    q = softmax((t - c) / teacher_temp),  p = softmax(s / student_temp)

with t and s the teacher's and the student's logits. The methods differ in their heads, in the centre c (``centre``), and in
the weight m of the mean entropy; an objective's class attributes are what its paper has, and the configuration may
override each. With a frozen teacher c and m are what RoB (2301.09451) released, c = 0 and m = 0 and Sinkhorn for SwAV alone;
without one they are the method's own (``sinkhorn_alone``, ``mean_entropy_alone``). RoB's pairing is "same" with local crops:

=====  ===============================  =======  ====================================================================
       q                                targets  student's head, fresh
=====  ===============================  =======  ====================================================================
dino   softmax(t / .07)                 2        DINO's, or ``head_type`` "mlp"
swav   Sinkhorn(t / .03), of the batch  1        SwAV's; or "mlp" to the teacher's frozen prototypes, no unit rows
msn    softmax(t / .025)                2        "mlp", or MSN's
ibot   softmax(t / .07), class token    2        iBOT's, or "mlp"
=====  ===============================  =======  ====================================================================

The presets ``rob-dino``, ``rob-swav`` ... set all of it; heads and pairing are otherwise those that did best in
``benchmarks/claims.py``.
"""

# What its base may lack, it always has.
# pyright: reportIncompatibleVariableOverride=false

import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.heads import Activation, ProjectionHead, Prototypes
from ...common.ranks import mean_over_ranks
from ...common.store.encodings import check_temperature
from ..collapse import entropies
from ..config import ObjectiveConfig
from ..kernels import mean_entropy, prototype_cross_entropy
from ..kernels.target import EmbeddingTarget, Target
from ..targets.space import TargetSpace
from .centre import SINKHORN_ITERATIONS, SinkhornCentre, build_centre, build_sinkhorn
from .koleo import koleo
from .objective import Objective, ObjectiveContext
from .queue import queue_length


class PrototypeObjective(Objective):
    """The student's distribution over prototypes matches the teacher's.

    ``head`` "teacher" starts the student's prototypes at the teacher's, "frozen" keeps them there too: the student's
    embedding then lives in the teacher's space, and has its width. ``head_type`` "mlp" is RoB's plain one: its fresh prototypes
    are its last linear layer, with biases; the teacher's meet an embedding that is not brought to unit length.
    """

    options = frozenset(
        ("student_temp", "teacher_temp", "centre_targets", "sinkhorn", "sinkhorn_iterations", "queue", "mean_entropy")
    ) | {"koleo", "head", "head_type"}

    num_layers: ClassVar[int] = 3
    activation: ClassVar[Activation] = "gelu"
    mlp_layers: ClassVar[int] = 2
    """Linear layers of ``head_type`` "mlp", the last one counted."""
    mlp_activation: ClassVar[Activation | None] = None
    """Between the layers of ``head_type`` "mlp"."""
    bottleneck = 256
    weight_norm: ClassVar[bool] = True
    unit_prototypes: ClassVar[bool] = False
    sinkhorn_start: ClassVar[str] = "exponentials"
    sinkhorn_by_view: ClassVar[bool] = False
    """Whether each target view's rows are balanced apart, or all rows of a batch together."""
    queue_length: ClassVar[int] = 3840
    usual_head: ClassVar[str] = "fresh"
    """Of targets whose prototypes are known."""
    student_temp: float = 0.1
    sinkhorn = "none"
    mean_entropy = 0.0
    sinkhorn_alone: ClassVar[str] = "none"
    """``sinkhorn`` where there is no teacher."""
    mean_entropy_alone: ClassVar[float] = 0.0
    """``mean_entropy`` where there is no teacher."""

    prototypes: Prototypes
    teacher_temp: float

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        config, space = context.config, context.space
        if not space.num_prototypes:
            raise MisuseError(
                f"`objective` {config.name} needs prototype logits, but the teacher has no head: "
                "fit prototypes on its cached embeddings with rob cache-teacher --prototypes K"
            )
        teacher_temp = config.teacher_temp or space.teacher_temp
        if teacher_temp is None:
            raise MisuseError("the teacher has no temperature of its own: pass `teacher_temp` (0.04 to 0.1)")
        if space.ladder:
            check_temperature(space.ladder, teacher_temp)
        self.teacher_temp, self.loss_impl = teacher_temp, config.loss_impl
        if config.student_temp is not None:
            self.student_temp = config.student_temp
        if space.of_student:
            self.sinkhorn, self.mean_entropy = self.sinkhorn_alone, self.mean_entropy_alone
        if config.mean_entropy is not None:
            self.mean_entropy = config.mean_entropy
        self.koleo, self.num_global = config.koleo or 0.0, context.num_global
        if config.sinkhorn is not None:
            self.sinkhorn = config.sinkhorn
        elif config.queue is not None and self.sinkhorn_alone == "queue":
            self.sinkhorn = "queue"  # who gives its length asks for it
        self._build_head(config, context.num_features, space)  # first: a queue's random rows must not move it
        self.centres = nn.ModuleList(self._centres(context))

    @classmethod
    def embedding_dim(cls, config: ObjectiveConfig) -> int:
        return config.bottleneck or cls.bottleneck

    def _centres(self, context: ObjectiveContext) -> list[nn.Module]:
        """One for all target views, or one each."""
        config, space = context.config, context.space
        if config.queue is not None and self.sinkhorn != "queue":
            raise MisuseError(f"`queue` is for `sinkhorn` queue, and it is {self.sinkhorn}: leave one of them out")
        iterations = config.sinkhorn_iterations
        if self.sinkhorn == "none":
            if iterations is not None:
                raise MisuseError(
                    "`sinkhorn_iterations` is for `sinkhorn` batch or queue, and it is none: leave it out"
                )
            return [build_centre(config.centre_targets or space.usual_centre, space)]
        if config.centre_targets not in (None, "none"):
            raise MisuseError(
                f"`sinkhorn` {self.sinkhorn} evens out the prototypes whatever the centre: "
                f"leave out `centre_targets` {config.centre_targets}, or pass `sinkhorn` none"
            )
        if iterations == 0:
            if config.queue is not None:
                raise MisuseError(
                    "`sinkhorn_iterations` 0 is a softmax, which no `queue` changes: leave one of them out"
                )
            return [build_centre("none", space)]
        rows = queue_length(config.queue, self.queue_length, context.num_images) if self.sinkhorn == "queue" else None
        number = context.target_views if self.sinkhorn_by_view else 1
        rounds = SINKHORN_ITERATIONS if iterations is None else iterations
        return [build_sinkhorn(space, self.sinkhorn_start, rows, rounds) for _ in range(number)]

    def _build_head(self, config: ObjectiveConfig, num_features: int, space: TargetSpace) -> None:
        mlp = config.head_type == "mlp"
        head = config.head or ("fresh" if mlp or space.prototypes is None else self.usual_head)
        rows = None if head == "fresh" else space.prototypes
        if rows is None and head != "fresh":
            raise MisuseError(f"`head` {head} needs a teacher with prototypes, and these targets have none: fresh")
        norm, hidden = config.head_norm is not False, config.hidden_dim
        if mlp and rows is None:
            for field in ("bottleneck", "norm_last_layer"):
                if getattr(config, field) is not None:
                    raise MisuseError(f"`{field}`: `head_type` mlp goes straight to its logits, leave `{field}` out")
            self.head = ProjectionHead(num_features, hidden, None, self.mlp_layers, self.mlp_activation, norm)
            self.prototypes = Prototypes(space.num_prototypes, hidden, weight_norm=False, bias=True)
            return
        if mlp and config.bottleneck not in (None, space.dim):
            raise MisuseError(
                f"`bottleneck` {config.bottleneck} does not fit `head` {head}: the teacher's prototypes have {space.dim} "
                "dimensions, leave `bottleneck` out"
            )
        bottleneck = config.bottleneck or self.bottleneck if rows is None else space.dim
        layers, activation = (self.mlp_layers, self.mlp_activation) if mlp else (self.num_layers, self.activation)
        self.head = ProjectionHead(num_features, hidden, bottleneck, layers, activation, norm, unit=not mlp)
        learn_gain = config.norm_last_layer is False
        self.prototypes = Prototypes(space.num_prototypes, bottleneck, self.weight_norm, learn_gain)
        if rows is not None:
            # Frozen ones are the teacher's own, lengths and all, as its half of the loss has them.
            rows = F.normalize(rows, dim=1) if self.unit_prototypes and head != "frozen" else rows
            gained = {"weight_v": rows, "weight_g": rows.norm(dim=1, keepdim=True)}
            self.prototypes.load_state_dict(gained if self.weight_norm else {"weight": rows})
        if head == "frozen":
            self.prototypes.requires_grad_(False)

    def use_queue(self, serves: bool) -> None:
        for centre in self.centres:
            if isinstance(centre, SinkhornCentre):
                centre.queueing = serves

    def copy_for_targets(self) -> Self:
        copy = super().copy_for_targets()
        copy.centres = nn.ModuleList()
        return copy

    def forward(self, features: Tensor, target: Target | None, pair_weights: Tensor) -> Tensor:
        """features (B, V, F); target of G views an image; pair_weights (V, G).

        Without a target the student's own first G views are it, as in SwAV without a teacher.
        """
        embedding, prototypes = self.embed(features), self.prototypes.matrix()
        if target is None:
            target = EmbeddingTarget(embedding[:, : pair_weights.shape[1]].detach(), prototypes.detach())
        parts = [(target, pair_weights)]
        if len(self.centres) > 1:
            parts = [(target.views(g, g + 1), pair_weights[:, g : g + 1]) for g in range(target.num_views)]
        centres = [centre(part, self.teacher_temp) for centre, (part, _) in zip(self.centres, parts, strict=True)]
        if self.watching:  # the first view tells for all
            self.targets_found = entropies(parts[0][0], self.teacher_temp, centres[0])
        loss = torch.stack(
            [
                prototype_cross_entropy(
                    embedding,
                    prototypes,
                    part,
                    student_temp=self.student_temp,
                    teacher_temp=self.teacher_temp,
                    centre=centre,
                    pair_weights=weights,
                    student_bias=self.prototypes.bias,
                    impl=self.loss_impl,
                    check_finite=False,  # the run does, for every objective
                )
                for centre, (part, weights) in zip(centres, parts, strict=True)
            ]
        ).sum()
        if self.mean_entropy:
            entropy = mean_entropy(embedding, prototypes, self.student_temp, mean_over_ranks, self.prototypes.bias)
            loss = loss + self.mean_entropy * (math.log(len(prototypes)) - entropy)
        if self.koleo:  # of the global crops, which come first
            loss = loss + self.koleo * koleo(features[:, : self.num_global or pair_weights.shape[1]])
        return loss
