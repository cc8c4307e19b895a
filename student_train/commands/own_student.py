"""``--student`` of the commands that take runs: a network of the user's own code is named again, for no file may have it
imported.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

from ...common.errors import MisuseError
from ...common.factories import is_factory, name_factory
from ...common.settings import Setting

Students = Annotated[
    tuple[str, ...],
    Setting(
        "package.module:factory, where a run's student is of your own code: it was given so to rob train-student, and nothing is "
        "imported because a file names it. Give it several times for several.",
        option="--student",
    ),
]


def of_runs(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, a command, with the option."""
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
        function(*arguments, **options)

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run
