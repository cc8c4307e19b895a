"""``rob push``."""

from collections.abc import Callable

from ...common.screen import note
from ..export.config import PushConfig


def push(config: PushConfig, teacher_licence: Callable[[str], str | None]) -> None:
    """A run onto the Hub: weights, exports and a model card."""
    from ..export.push import push

    folder, sent = push(config, teacher_licence)
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        note(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")
    note(
        f"{folder} was sent to {sent}"
        if sent
        else f"nothing was sent: {folder} is what would be; read README.md there; "
        "to send your own, copy it elsewhere, edit it, and give it as --card"
    )
