"""Tiny vision backbones without labels: run a teacher once, train many students from its cached targets.

The stages and the measurements are functions that take one frozen configuration::

    import rob
    data, store = Path("data.beton"), Path("targets.zarr")
    rob.cache_teacher(rob.CacheConfig(data, store, rob.TeacherConfig("vit_small_patch16_224.dino")))
    rob.train_student(rob.TrainConfig(data, Path("runs/first"), rob.StudentConfig("resnet18"), rob.Cached(store)))
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.errors import FailureError, MisuseError
    from .common.factories import name_factory
    from .common.images.pack import PackConfig, pack
    from .common.store.encodings import Encoding
    from .common.store.reader import TargetStore
    from .common.views.loader import LoaderConfig
    from .common.views.recipes import Recipe, RecipeOverrides, get_recipe
    from .student_train.as_teacher import ExportTeacherConfig, export_teacher
    from .student_train.checkpoint import load_student
    from .student_train.config import PairingChoice
    from .student_train.evaluate.detection.detect import DetectConfig, detect
    from .student_train.evaluate.knn import knn
    from .student_train.evaluate.labelled import labelled_images
    from .student_train.evaluate.linear import LinearConfig, linear
    from .student_train.evaluate.lowshot import Share, lowshot
    from .student_train.evaluate.network import FrozenNetwork
    from .student_train.export.config import ExportConfig
    from .student_train.export.export import export
    from .student_train.finetune.classify import finetune_classifier
    from .student_train.finetune.config import ClassifyConfig, SegmentConfig
    from .student_train.finetune.segment import finetune_segmenter
    from .student_train.finetune.tuned import load_tuned
    from .student_train.objectives import ObjectiveConfig
    from .student_train.optimiser import OptimiserConfig
    from .student_train.plan import make_plan
    from .student_train.presets import preset
    from .student_train.report.config import ReportConfig
    from .student_train.report.report import report
    from .student_train.students import StudentConfig
    from .student_train.targets.cached import Cached
    from .student_train.targets.ensemble import Ensemble
    from .student_train.targets.momentum import Momentum
    from .student_train.targets.online import Online
    from .student_train.targets.pairing import PairingConfig
    from .student_train.targets.with_copy import WithCopy
    from .student_train.train import train_student
    from .student_train.train_config import TrainConfig
    from .teacher_cache.cache import CacheConfig, cache_teacher
    from .teacher_cache.teachers import TeacherConfig, load_teacher
    from .teacher_cache.verify import VerifyConfig, verify

_HOME = {
    "common.store.encodings": ("Encoding",),
    "common.errors": ("FailureError", "MisuseError"),
    "common.factories": ("name_factory",),
    "common.images.pack": ("PackConfig", "pack"),
    "common.views.loader": ("LoaderConfig",),
    "common.store.reader": ("TargetStore",),
    "common.views.recipes": ("Recipe", "RecipeOverrides", "get_recipe"),
    "student_train.as_teacher": ("ExportTeacherConfig", "export_teacher"),
    "student_train.checkpoint": ("load_student",),
    "student_train.evaluate.detection.detect": ("DetectConfig", "detect"),
    "student_train.evaluate.knn": ("knn",),
    "student_train.evaluate.labelled": ("labelled_images",),
    "student_train.evaluate.linear": ("LinearConfig", "linear"),
    "student_train.evaluate.lowshot": ("Share", "lowshot"),
    "student_train.evaluate.network": ("FrozenNetwork",),
    "student_train.config": ("PairingChoice",),
    "student_train.export.config": ("ExportConfig",),
    "student_train.export.export": ("export",),
    "student_train.finetune.classify": ("finetune_classifier",),
    "student_train.finetune.config": ("ClassifyConfig", "SegmentConfig"),
    "student_train.finetune.segment": ("finetune_segmenter",),
    "student_train.finetune.tuned": ("load_tuned",),
    "student_train.objectives": ("ObjectiveConfig",),
    "student_train.optimiser": ("OptimiserConfig",),
    "student_train.report.config": ("ReportConfig",),
    "student_train.report.report": ("report",),
    "student_train.students": ("StudentConfig",),
    "student_train.targets.cached": ("Cached",),
    "student_train.targets.ensemble": ("Ensemble",),
    "student_train.targets.momentum": ("Momentum",),
    "student_train.targets.online": ("Online",),
    "student_train.targets.with_copy": ("WithCopy",),
    "student_train.targets.pairing": ("PairingConfig",),
    "student_train.plan": ("make_plan",),
    "student_train.presets": ("preset",),
    "student_train.train": ("train_student",),
    "student_train.train_config": ("TrainConfig",),
    "teacher_cache.cache": ("CacheConfig", "cache_teacher"),
    "teacher_cache.teachers": ("TeacherConfig", "load_teacher"),
    "teacher_cache.verify": ("VerifyConfig", "verify"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CacheConfig",
    "Cached",
    "ClassifyConfig",
    "DetectConfig",
    "Encoding",
    "Ensemble",
    "ExportConfig",
    "ExportTeacherConfig",
    "FailureError",
    "FrozenNetwork",
    "LinearConfig",
    "LoaderConfig",
    "MisuseError",
    "Momentum",
    "ObjectiveConfig",
    "Online",
    "OptimiserConfig",
    "PackConfig",
    "PairingChoice",
    "PairingConfig",
    "Recipe",
    "RecipeOverrides",
    "ReportConfig",
    "SegmentConfig",
    "Share",
    "StudentConfig",
    "TargetStore",
    "TeacherConfig",
    "TrainConfig",
    "VerifyConfig",
    "WithCopy",
    "cache_teacher",
    "detect",
    "export",
    "export_teacher",
    "finetune_classifier",
    "finetune_segmenter",
    "get_recipe",
    "knn",
    "labelled_images",
    "linear",
    "load_student",
    "load_teacher",
    "load_tuned",
    "lowshot",
    "make_plan",
    "name_factory",
    "pack",
    "preset",
    "report",
    "train_student",
    "verify",
]
try:
    __version__ = version("rob")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    """Imported on first use, so that the command line's --help stays instant."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rob' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
