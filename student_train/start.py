"""Where a student's weights begin: published ones, those of a file, or those of another run."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common.errors import MisuseError, some
from ..common.exported import TORCHVISION, StudentInfo, described_in, is_own, read_metadata
from ..common.factories import is_factory
from ..common.own_network import parts_of, whole_of
from ..common.pretrained import check_pretrained, converted, pretrained_normalisation, pretrained_tensors
from ..common.tensors import Tensors, read_tensors, under
from .begun import read_begun
from .checkpoint import WEIGHTS_NAME
from .own_student import torchvision_model
from .student_config import PRETRAINED, StudentConfig
from .students import describe_student

COUNTER = "num_batches_tracked"
"""What BatchNorm counts, and many files leave out."""
NAMED = 3
"""Tensors that are named one by one."""


def with_start(student: StudentConfig, begun: Mapping[str, Any] | None = None) -> StudentConfig:
    """Its images normalised as those of the weights that it begins with, where nothing else is asked for.

    ``begun``: the settings of a run that goes on, which says itself what it began with; the file need not be there any more.
    MisuseError: nothing there to begin with.
    """
    if begun is not None:
        told = begun.get("student_info", {})
        found = tuple(told.get("mean", ())), tuple(told.get("std", ()))
        known = begun.get("student", {})
        found = found if known.get("mean") or known.get("std") else None
    else:
        found = None if student.init is None else _normalisation(student)
    if found is None:
        return student
    return replace(student, mean=student.mean or found[0], std=student.std or found[1])  # type: ignore[arg-type]


def begin(backbone: nn.Module, student: StudentConfig) -> str:
    """Fill ``backbone``, which ``student`` describes, with what it begins with. A sentence on what was taken.

    MisuseError: nothing there, or nothing that fits.
    """
    whole = whole_of(backbone)
    expected = {name: t for name, t in whole.state_dict().items() if not name.endswith(COUNTER)}
    tensors, source = _tensors(backbone, student)
    fits = _fitting(expected, tensors)
    # Other names, or positions of another size: timm knows them.
    if len(fits) < len(expected) and not is_own(student.name):
        other = converted(backbone, tensors)
        if len(better := _fitting(expected, other)) > len(fits):
            tensors, fits = other, better
    if not fits:
        raise MisuseError(
            f"{source}: none of its {len(tensors)} tensors is one of {student.name}{_hint(expected, tensors)}"
        )
    whole.load_state_dict(fits, strict=False)
    return _sentence(source, expected, tensors, fits)


def _tensors(backbone: nn.Module, student: StudentConfig) -> tuple[Tensors, str]:
    """What is there, and what it is called."""
    assert student.init is not None
    if student.init == PRETRAINED:
        what = f"`init` pretrained of {student.name}"
        if is_own(student.name):
            _refuse_own(student.name)
            return dict(torchvision_model(student.name, pretrained=True).state_dict()), what
        return pretrained_tensors(student.name, dict(describe_student(student).timm_kwargs), "init"), what
    tensors, what = read_tensors(_path(student.init)), f"`init` {student.init}"
    if student.init_prefix is None:
        return tensors, what
    prefix = f"{student.init_prefix.rstrip('.')}."
    found = under(tensors, prefix)
    if not found:
        raise MisuseError(
            f"`init_prefix` {prefix} begins no name in {student.init}, whose tensors are in {_tops(tensors)}"
        )
    return found, f"{what}, {prefix}*"


def _path(init: str) -> Path:
    """The file. MisuseError: a folder without one."""
    path = Path(init).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise MisuseError(
                f"`init` {init} does not exist: give pretrained, a run's folder, or a .safetensors or .pth file"
            )
        return path
    if not (path / WEIGHTS_NAME).exists():
        raise MisuseError(
            f"`init` {init} has no {WEIGHTS_NAME}: give a finished run, or with `extend` one that was stopped, or a file"
        )
    return path / WEIGHTS_NAME


def _normalisation(student: StudentConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that go with the weights; None: they do not say."""
    assert student.init is not None
    if student.init == PRETRAINED:
        if is_own(student.name):
            _refuse_own(student.name)
            return None
        check_pretrained(student.name, "init")
        return pretrained_normalisation(student.name)
    folder = Path(student.init).expanduser()
    path = folder if not folder.is_dir() or (folder / WEIGHTS_NAME).exists() else None
    info = told_by(folder) if path is None else described_in(read_metadata(path := _path(student.init)), path)
    return None if info is None else (info.mean, info.std)


def told_by(run: Path) -> StudentInfo | None:
    """The student of a run that was stopped; None: it does not say."""
    try:
        return StudentInfo.from_dict((read_begun(run) or {})["student_info"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _refuse_own(name: str) -> None:
    if is_factory(name):
        raise MisuseError(
            f"`init` pretrained: nobody publishes weights of {name}: have the function load them, or give `init` FILE"
        )
    assert name.startswith(TORCHVISION)


def _fitting(expected: Tensors, tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name, t in expected.items() if name in tensors and tensors[name].shape == t.shape}


def _sentence(source: str, expected: Tensors, tensors: Tensors, fits: Tensors) -> str:
    said = [f"{source}: {len(fits)} of {len(expected)} tensors of the student begin as there"]
    shapes = [name for name in expected if name in tensors and name not in fits]
    if shapes:
        words = [f"{n} is {tuple(tensors[n].shape)}, here {tuple(expected[n].shape)}" for n in shapes]
        said.append(f"at random, for another shape: {some(words, NAMED)}")
    missing = [name for name in expected if name not in tensors]
    if missing:
        said.append(f"at random, not there: {parts_of(missing, fits)}")
    unused = [name for name in tensors if name not in expected and not name.endswith(COUNTER)]
    if unused:
        said.append(f"not used: {parts_of(unused, fits)}")
    return "; ".join(said)


def _hint(expected: Tensors, tensors: Tensors) -> str:
    """The prefix under which most would fit, where there is one."""
    prefixes = {f"{name.rsplit('.', depth)[0]}." for name in tensors for depth in range(1, name.count(".") + 1)}
    counted = {prefix: len(_fitting(expected, under(tensors, prefix))) for prefix in prefixes}
    best = max(counted, key=lambda prefix: (counted[prefix], -len(prefix)), default=None)
    if best is None or not counted[best]:
        return f"; they are in {_tops(tensors)}: is it of another network?"
    return f", but {counted[best]} are behind {best}: pass `init_prefix` {best}"


def _tops(tensors: Tensors) -> str:
    """What all names begin with, as far as there is room."""
    return parts_of(dict.fromkeys(name.partition(".")[0] for name in tensors), ())
