"""``rob export-teacher``."""

from ...common.screen import note
from ..train_config import ExportConfig


def export_teacher(config: ExportConfig) -> None:
    """A trained student as a teacher: its backbone, head and prototypes in one file, for rob cache-teacher --checkpoint."""
    from ..as_teacher import export_teacher

    note(f"written to {export_teacher(config)}")
