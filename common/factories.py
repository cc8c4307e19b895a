"""Networks of the user's own: a function ``package.module:factory`` that builds one, without arguments.

Importing a module runs it, and a run's folder or a weights file may come from anywhere: what a file names is never imported for
that. Only what the user names in this process is (``--student``, ``--teacher``, a function given in Python); it is remembered
here, and a file that names the same is built by it.
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from .errors import MisuseError, named_line, unknown_name

if TYPE_CHECKING:
    from torch import nn

    Factory = Callable[[], nn.Module]

PATTERN = re.compile(r"[^\W\d]\w*(\.\w+)*:[^\W\d][\w.<>]*(#[0-9a-f]{8})?")
"""Of a name. That of a module object has the first digits of its structure's hash behind it."""

_named: dict[tuple[str, str], Any] = {}
"""What the user named in this process, by what it is for and its name: functions that build a network, or networks."""


def is_factory(name: str) -> bool:
    """Whether a network's name is that of a factory, and not timm's."""
    return PATTERN.fullmatch(name) is not None


def name_factory(what: "str | Factory | nn.Module", setting: str = "student") -> str:
    """Import ``package.module:factory``, or take a function or a network as it is: from now on files of this name are built by
    it. Its name.

    MisuseError: it cannot be imported, or is nothing that builds a network.
    """
    from torch import nn  # here and below: the command line's --help knows of factories, and is instant

    if isinstance(what, str):
        if (setting, what) not in _named:
            _named[setting, what] = _imported(what, setting)
        return what
    if isinstance(what, nn.Module):
        name = f"{type(what).__module__}:{type(what).__qualname__}#{_structure(what)}"
        before = _named.get((setting, name))
        if before is not None and not _same_weights(before, what):
            raise MisuseError(
                f"`{setting}`: another {type(what).__qualname__} of this structure and other weights was given before: give a "
                "function that builds it"
            )
    elif callable(what):
        name = f"{what.__module__}:{getattr(what, '__qualname__', '')}"
        if not is_factory(name) or "<lambda>" in name:
            raise MisuseError(f"`{setting}` {what!r} has no name by which files know it: define a function with def")
        before = _named.get((setting, name))
        if before is not None and not _same_function(before, what):
            raise MisuseError(
                f"`{setting}`: another {name} was given before, which builds from other values: define one function for each"
            )
    else:
        raise MisuseError(
            f"`{setting}` is of the type {type(what).__name__}, expected a name, a torch.nn.Module or a function that builds one"
        )
    _named[setting, name] = what
    return name


def build_named(name: str, setting: str = "student") -> "nn.Module":
    """The network of a factory that the user has named; where it was given one only, that one, for the module may have moved
    since. A network that was given is copied.

    MisuseError: nobody named it in this process, or it does not build a network.
    """
    from torch import nn

    made_by = _named.get((setting, name))
    others = [found for (what_for, _), found in _named.items() if what_for == setting]
    if made_by is None and len(others) == 1:
        made_by = others[0]
    if made_by is None:
        raise MisuseError(
            f"its network is {name}, of somebody's own code, which is not imported because a file names it: pass `{setting}` "
            f"{name} where you trust it; in Python, call rob.name_factory with the function first"
        )
    if isinstance(made_by, nn.Module):
        return deepcopy(made_by)
    try:
        made = made_by()
    except Exception as error:  # of any code
        if isinstance(error, TypeError) and _wants_arguments(made_by):
            raise MisuseError(
                f"`{setting}` {name} wants arguments ({inspect.signature(made_by)}): name a function without any, which calls it"
            ) from error
        raise MisuseError(f"`{setting}` {name} failed to build a network: {named_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise MisuseError(f"`{setting}` {name} returned a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _imported(name: str, setting: str) -> Any:
    if not is_factory(name):
        raise MisuseError(f"`{setting}` {name} is no package.module:factory")
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # the console script has it not; last, so that a file there hides no installed package
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs code
        missing = (
            isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}.")
        )
        if missing:
            written = f"write {module_name.removesuffix('.py')}:{path}" if module_name.endswith(".py") else (
                "install its package, or be in the folder that it lies in"
            )  # fmt: skip
            raise MisuseError(f"`{setting}` {name}: there is no module {module_name} ({written})") from None
        raise MisuseError(f"`{setting}` {name}: importing {module_name} failed: {named_line(error)}") from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise unknown_name(f"factory of {module_name}", path, known) from None
        found = getattr(found, part)
    if not callable(found):
        raise MisuseError(f"`{setting}` {name} is a {type(found).__name__}, expected a function that builds a network")
    return found


def _wants_arguments(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _structure(network: "nn.Module") -> str:
    """The first digits of a hash of its tensors' names and shapes."""
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in network.state_dict().items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]


def _same_weights(a: "nn.Module", b: "nn.Module") -> bool:
    from .weights import hash_weights

    return hash_weights(a.state_dict()) == hash_weights(b.state_dict())


def _same_function(before: Any, now: Any) -> bool:
    """Whether one may stand for the other: not where the same lines were defined around other values. Lines that were edited
    may, as in a notebook."""
    a, b = getattr(before, "__closure__", None) or (), getattr(now, "__closure__", None) or ()
    if getattr(before, "__code__", None) != getattr(now, "__code__", None):
        return True
    return len(a) == len(b) and all(x.cell_contents is y.cell_contents for x, y in zip(a, b, strict=True))
