"""Objectives: what the student's features have to match. One small file each; a new paper is a new file here.

An objective owns the student's head, and whatever it gathers from step to step (a queue, a running centre). It is a module
``(features (B, V, F), target of G views, pair_weights (V, G)) -> scalar loss`` and does not know who made the target: a
store, a teacher, or a momentum copy of the student, which shares its ``embed`` and ``prototypes``.
"""

from ..config import ObjectiveConfig
from .build import build_objective
from .dino import DinoObjective
from .disco import DiscoObjective
from .embedding import EmbeddingObjective
from .ibot import IbotObjective
from .moco import MocoObjective
from .msn import MsnObjective
from .objective import OBJECTIVES, Objective, ObjectiveContext, StudentMap
from .patch import PatchObjective
from .seed import SeedObjective
from .simreg import SimregObjective
from .swav import SwavObjective
from .without_teacher import CopySettings

__all__ = [
    "OBJECTIVES",
    "CopySettings",
    "DinoObjective",
    "DiscoObjective",
    "EmbeddingObjective",
    "IbotObjective",
    "MocoObjective",
    "MsnObjective",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveContext",
    "PatchObjective",
    "SeedObjective",
    "SimregObjective",
    "StudentMap",
    "SwavObjective",
    "build_objective",
]
