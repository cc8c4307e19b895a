"""``rob export`` and ``rob export-teacher``."""

from ...common.screen import accuracies, bar, note
from ..export.config import ExportConfig
from ..train_config import ExportTeacherConfig


def export(config: ExportConfig) -> None:
    """A student as files for devices, each checked."""
    from ..export.export import export

    with bar("exporting", "files") as update:
        files = export(config, note, update)
    accuracies(
        f"{files[0].student}, exported",
        ("file", "MB", "ms, one thread", "lowest cosine", "k-NN top-1 %", "k-NN of torch %"),
        [
            (
                entry.file,
                entry.bytes / 1e6,
                entry.latency_ms,
                entry.agreement and f"{entry.agreement.lowest_cosine:.6f}",
                entry.agreement and entry.agreement.knn,
                entry.agreement and entry.agreement.knn_torch,
            )
            for entry in files
        ],
        named=True,
    )
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent)
    note(f"written to {folder}, and what was measured to export.json there")
    for entry in files:
        shape = " x ".join(map(str, entry.input["shape"]))
        note(f"{entry.file}: {entry.input['form']} image ({shape}) -> features ({entry.output['shape'][-1]})")


def export_teacher(config: ExportTeacherConfig) -> None:
    """A student with its head as the next teacher."""
    from ..as_teacher import export_teacher

    note(f"written to {export_teacher(config)}")
