"""An objective out of its configuration."""

from dataclasses import replace

from torch.nn.modules.batchnorm import _BatchNorm

from ...common.errors import MisuseError
from ..config import ObjectiveConfig
from ..targets.space import TargetSpace
from .ensemble import EnsembleObjective
from .objective import OBJECTIVES, Objective, ObjectiveContext, StudentMap


def build_objective(
    config: ObjectiveConfig,
    num_features: int,
    space: TargetSpace,
    target_views: int = 2,
    num_images: int | None = None,
    student_map: StudentMap | None = None,
    num_global: int | None = None,
) -> Objective:
    """The objective of such an ``ObjectiveContext``, one for each teacher of an ensemble. MisuseError: the targets cannot serve
    it."""
    context = ObjectiveContext(config, num_features, space, target_views, num_images, student_map, num_global)
    if space.members:
        return EnsembleObjective(context, [_of_one(replace(context, space=member)) for _, member in space.members])
    return _of_one(context)


def _of_one(context: ObjectiveContext) -> Objective:
    objective = OBJECTIVES[context.config.name](context)
    if context.config.norm_by_size and not any(isinstance(layer, _BatchNorm) for layer in objective.head.modules()):
        raise MisuseError(
            "`norm_by_size` is for the head's BatchNorm, and this head has none: leave it out, or use `head_norm`"
        )
    return objective
