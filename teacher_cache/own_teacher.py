"""A teacher of the user's own code: ``package.module:factory``, with the mean, deviation and size of its images."""

from pathlib import Path
from typing import Any

from torch import nn

from ..common.errors import MisuseError
from ..common.factories import build_named
from ..common.own_network import OwnNetwork
from ..common.tensors import read_tensors
from .config import TeacherConfig

EXAMPLES = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "image_size": "224"}


def own_backbone(config: TeacherConfig) -> tuple[OwnNetwork, dict[str, Any]]:
    """The network, and the keywords of ``Teacher`` that say which images it takes.

    MisuseError: it cannot be built, makes no features, or nobody says how its images are normalised; a ``checkpoint`` of other
    tensors; settings that are for timm's.
    """
    for name in ("backbone_args", "teacher_features"):
        if getattr(config, name):
            raise MisuseError(
                f"`{name}` is for timm's networks, and `teacher` {config.name} is your own: do it in its function"
            )
    model = build_named(config.name, "teacher")
    if config.checkpoint is not None:
        fill(model, config.checkpoint, config.name)
    mean, std = (_three(config, model, name) for name in ("mean", "std"))
    size = config.size or _told(model, "image_size")
    if not isinstance(size, int) or size < 1:
        raise _unsaid(config.name, "image_size", "teacher_size")
    backbone = OwnNetwork(model, None, size, f"teacher {config.name}", "teacher", learns=False)
    return backbone, {"mean": mean, "std": std, "view_size": size}


def fill(model: nn.Module, path: Path, name: str) -> None:
    """MisuseError: the tensors of the file are not those of ``model``."""
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise MisuseError(f"checkpoint {path} is not of {name}: {first[0].strip()[:200]}") from error


def _three(config: TeacherConfig, model: nn.Module, name: str) -> tuple[float, ...]:
    given = getattr(config, name) or _told(model, name)
    try:
        values = tuple(map(float, given))
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise _unsaid(config.name, name, f"teacher_{name}")
    return values


def _told(model: nn.Module, name: str) -> Any:
    """As an attribute, or in what timm keeps of a network; None: nowhere."""
    if (value := getattr(model, name, None)) is not None:
        return value.tolist() if hasattr(value, "tolist") else value
    told = getattr(model, "default_cfg", None)
    told = told if isinstance(told, dict) else {}
    return told["input_size"][-1] if name == "image_size" and told.get("input_size") else told.get(name)


def _unsaid(teacher: str, name: str, setting: str) -> MisuseError:
    return MisuseError(
        f"`teacher` {teacher} does not say its {name}, which its images need: pass `{setting}` {EXAMPLES[name]} (or what it was "
        f"trained with), or give the network an attribute .{name}"
    )
