"""What the commands that take runs have in common: a run may be at an address, and ``--student`` names a network of the user's
own code again, for no file may have it imported.
"""

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...common.errors import MisuseError
from ...common.factories import is_factory, name_factory
from ...common.places import is_address
from ...common.screen import note
from ...common.settings import Setting

if TYPE_CHECKING:
    from ..mirror import Mirror

Students = Annotated[
    tuple[str, ...],
    Setting(
        "package.module:factory, where a run's student is of your own code: it was given so to rob train-student, and nothing is "
        "imported because a file names it. Give it several times for several.",
        option="--student",
    ),
]


RUNS = ("what", "run", "runs")
"""The names of parameters, and of fields of configurations, that hold folders or addresses of runs."""


def at_hand(options: dict[str, Any], training: bool = False) -> "tuple[dict[str, Any], list[Mirror]]":
    """The options of a command, with runs that are at an address copied here, but for what only its ``training`` needs."""
    mirrors: list[Mirror] = []

    def here(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(here, value))
        if not isinstance(value, str | Path) or not is_address(value):
            return value
        from ..mirror import CHECKPOINT, Mirror

        mirror = Mirror.of(value, kind="train" if training else "read")
        assert mirror is not None
        mirror.pull_some(*(() if training else (CHECKPOINT,)))
        mirrors.append(mirror)
        return type(value)(mirror.folder)

    def with_runs_here(name: str, value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field: here(getattr(value, field)) for field in RUNS if hasattr(value, field)})
        return here(value) if name in RUNS else value

    return {name: with_runs_here(name, value) for name, value in options.items()}, mirrors


def of_runs(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, a command, with the option. The run that it takes may be at an address: then a copy is worked on, and what is
    added to it goes there."""
    signature = inspect.signature(function)
    option = inspect.Parameter("student", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=Students)

    @wraps(function)
    def run(*arguments: Any, student: tuple[str, ...] = (), **options: Any) -> None:
        for name in student:
            if not is_factory(name):
                raise MisuseError(
                    f"`student` {name} is no package.module:factory: a run says itself which network of timm or torchvision it "
                    "has, leave it out"
                )
            name_factory(name)
        options, mirrors = at_hand(options)
        function(*arguments, **options)
        for mirror in mirrors:
            if mirror.push():
                note(f"{mirror} has it, too")

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run
