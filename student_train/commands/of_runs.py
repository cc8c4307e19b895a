"""What the commands that take runs have in common: a run may be at an address, and ``--student`` names a network of the user's
own code again, for no file may have it imported.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
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


def at_hand(options: dict[str, Any]) -> "tuple[dict[str, Any], Mirror | None]":
    """The options of a command, with a run that is at an address copied here, but for what only its training needs."""
    for name, value in options.items():
        run = value if name == "what" else getattr(value, "run", None)
        if isinstance(run, str | Path) and is_address(run):
            from ..mirror import CHECKPOINT, Mirror

            mirror = Mirror.of(run, kind="read")
            assert mirror is not None
            mirror.pull_some(CHECKPOINT)
            return {
                **options,
                name: str(mirror.folder) if name == "what" else replace(value, run=mirror.folder),
            }, mirror
    return options, None


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
        options, mirror = at_hand(options)
        function(*arguments, **options)
        if mirror is not None and mirror.push():
            note(f"{mirror} has it, too")

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run
