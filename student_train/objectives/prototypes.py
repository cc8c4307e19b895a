"""What RoB's objectives over prototypes share: the student's head, and the cross-entropy against the teacher's distribution.

    L = sum_{v,g} w[v,g] mean_b H(q[b,g], p[b,v]) + m (log K - H(mean_{b,v} p[b,v]))
    q = softmax((t - c) / teacher_temp),  p = softmax(s / student_temp)

with t and s the teacher's and the student's logits. The methods differ in their heads, in the centre c (``centre``), and in
the weight m of the mean entropy; an objective's class attributes are what its paper has, and the configuration may
override each. How RoB (2301.09451) itself pairs, centres and starts its head is not public: all are switches.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.errors import MisuseError
from ...common.heads import Activation, ProjectionHead, Prototypes
from ...common.ranks import mean_over_ranks
from ...common.store.encodings import check_temperature
from ..collapse import entropies
from ..kernels import mean_entropy, prototype_cross_entropy
from ..kernels.target import EmbeddingTarget, Target
from .centre import build_centre, build_sinkhorn
from .queue import queue_length

if TYPE_CHECKING:
    from ..branches import TargetSpace
    from . import ObjectiveConfig

HEADS = ("fresh", "teacher", "frozen")


class PrototypeObjective(nn.Module):
    """The student's distribution over prototypes matches the teacher's.

    ``teacher_temp`` may be set between steps, as a warm-up does. While ``watching``, a step leaves in ``targets_found`` what
    ``collapse`` says of its targets. ``head`` "teacher" starts the student's prototypes at the teacher's, "frozen" keeps them
    there too: the student's embedding then lives in the teacher's space, and has its width.
    """

    options: ClassVar[frozenset[str]] = frozenset(
        ("student_temp", "teacher_temp", "centre", "sinkhorn", "queue", "mean_entropy", "head")
    )
    """Fields of ``ObjectiveConfig`` that this objective reads beside the head's widths."""

    num_layers: ClassVar[int] = 3
    activation: ClassVar[Activation] = "gelu"
    bottleneck: ClassVar[int] = 256
    weight_norm: ClassVar[bool] = True
    unit_prototypes: ClassVar[bool] = False
    sinkhorn_start: ClassVar[str] = "exponentials"
    sinkhorn_by_view: ClassVar[bool] = False
    """Whether each target view's rows are balanced apart, or all rows of a batch together."""
    queue_length: ClassVar[int] = 3840
    usual_head: ClassVar[str] = "fresh"
    """Of targets whose prototypes are known."""
    student_temp: float = 0.1
    sinkhorn: str = "none"
    mean_entropy: float = 0.0

    def __init__(
        self,
        config: "ObjectiveConfig",
        num_features: int,
        space: "TargetSpace",
        targets: int = 2,
        num_images: int | None = None,
    ) -> None:
        """As ``build_objective``."""
        super().__init__()
        self.watching, self.targets_found = False, {}
        if not space.num_prototypes:
            raise MisuseError(
                f"--objective {config.name} needs prototype logits, but the teacher has no head: "
                "fit prototypes on its cached embeddings with rob cache-teacher --prototypes K"
            )
        teacher_temp = config.teacher_temp or space.teacher_temp
        if teacher_temp is None:
            raise MisuseError("the teacher has no temperature of its own: pass --teacher-temp (0.04 to 0.1)")
        if space.ladder:
            check_temperature(space.ladder, teacher_temp)
        self.teacher_temp, self.loss_impl = teacher_temp, config.loss_impl
        self.student_temp = given(config.student_temp, self.student_temp)
        self.mean_entropy = given(config.mean_entropy, self.mean_entropy)
        self.sinkhorn = given(config.sinkhorn, self.sinkhorn)
        self._build_head(config, num_features, space)  # first: a queue's random rows must not move it
        self.centres = nn.ModuleList(self._centres(config, space, targets, num_images))

    def _centres(
        self, config: "ObjectiveConfig", space: "TargetSpace", targets: int, num_images: int | None
    ) -> list[nn.Module]:
        """One for all target views, or one each."""
        if config.queue is not None and self.sinkhorn != "queue":
            raise MisuseError(f"--queue is for --sinkhorn queue, and it is {self.sinkhorn}: leave one of them out")
        if self.sinkhorn == "none":
            return [build_centre(config.centre or space.usual_centre, space)]
        if config.centre not in (None, "none"):
            raise MisuseError(
                f"--sinkhorn {self.sinkhorn} evens out the prototypes whatever the centre: "
                f"leave out --centre-targets {config.centre}, or pass --sinkhorn none"
            )
        rows = queue_length(config.queue, self.queue_length, num_images) if self.sinkhorn == "queue" else None
        number = targets if self.sinkhorn_by_view else 1
        return [build_sinkhorn(space, self.sinkhorn_start, rows) for _ in range(number)]

    def _build_head(self, config: "ObjectiveConfig", num_features: int, space: "TargetSpace") -> None:
        head = config.head or ("fresh" if space.prototypes is None else self.usual_head)
        rows = None if head == "fresh" else space.prototypes
        if rows is None and head != "fresh":
            raise MisuseError(f"--head {head} needs a teacher with prototypes, and these targets have none: fresh")
        bottleneck = config.bottleneck or self.bottleneck if rows is None else space.dim
        self.head = ProjectionHead(
            num_features, config.hidden_dim, bottleneck, self.num_layers, self.activation, given(config.head_norm, True)
        )
        learn_gain = config.norm_last_layer is False
        self.prototypes = Prototypes(space.num_prototypes, bottleneck, self.weight_norm, learn_gain)
        if rows is not None:
            rows = F.normalize(rows, dim=1) if self.unit_prototypes else rows
            gained = {"weight_v": rows, "weight_g": rows.norm(dim=1, keepdim=True)}
            self.prototypes.load_state_dict(gained if self.weight_norm else {"weight": rows})
        if head == "frozen":
            self.prototypes.requires_grad_(False)

    def embed(self, features: Tensor) -> Tensor:
        """Features (..., F) to what is compared with the prototypes: (..., D) float32 unit rows."""
        return self.head(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

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
                    impl=self.loss_impl,
                    check_finite=False,  # the run does, for every objective
                )
                for centre, (part, weights) in zip(centres, parts, strict=True)
            ]
        ).sum()
        if self.mean_entropy:
            entropy = mean_entropy(embedding, prototypes, self.student_temp, mean_over_ranks)
            loss = loss + self.mean_entropy * (math.log(len(prototypes)) - entropy)
        return loss


def given(value: Any, usual: Any) -> Any:
    """``value`` unless it is None: what the configuration says, or else the paper."""
    return usual if value is None else value
