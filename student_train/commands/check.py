"""``rob check``."""

from pathlib import Path
from typing import Annotated

from ...common.errors import FailureError
from ...common.screen import bar, note
from ...common.settings import Setting


def check(
    paths: Annotated[list[Path], Setting("Packed images, target stores, run folders, sweeps.", argument="PATH...")],
) -> None:
    """Look at every checksum of images, targets and runs."""
    from ..check import check

    damaged: list[str] = []
    for path in paths:
        with bar("checking", "parts") as update:
            found = check(path, update)
        damaged += found.damaged
        note(f"{path}: {found.parts}, {len(found.damaged) or 'none'} damaged")
    for problem in damaged[1:]:
        note(problem)
    if damaged:
        raise FailureError(damaged[0])
