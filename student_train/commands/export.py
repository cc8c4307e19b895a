"""``rob export`` and ``rob export-teacher``."""

from typing import TYPE_CHECKING

from ...common.screen import accuracies, bar, note
from ..export.config import ExportConfig
from ..train_config import ExportTeacherConfig

if TYPE_CHECKING:
    from ..export.exported_file import ExportedFile


def export(config: ExportConfig) -> None:
    """A student as files for devices, each checked."""
    from ..export.export import export

    with bar("exporting", "files") as update:
        files = export(config, note, update)
    logits = files[0].output["name"] == "logits"
    accuracies(
        f"{files[0].student}, exported",
        ("file", "MB", "ms, one thread", "lowest cosine")
        + (("as torch %", "top-1 %", "top-1 of torch %") if logits else ("k-NN top-1 %", "k-NN of torch %")),
        [
            (
                entry.file,
                entry.bytes / 1e6,
                entry.latency_ms,
                entry.agreement and f"{entry.agreement.lowest_cosine:.6f}",
                *_scores(entry, logits),
            )
            for entry in files
        ],
        named=True,
    )
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent)
    note(f"written to {folder}, and what was measured to export.json there")
    for entry in files:
        shape = " x ".join(map(str, entry.input["shape"]))
        out = " x ".join(map(str, entry.output["shape"][1:]))
        note(f"{entry.file}: {entry.input['form']} image ({shape}) -> {entry.output['name']} ({out})")


def _scores(entry: "ExportedFile", logits: bool) -> "tuple[float | None, ...]":
    found = entry.agreement
    if found is None:
        return (None,) * (3 if logits else 2)
    if not logits:
        return found.knn, found.knn_torch
    return found.same and 100 * found.same, found.top1, found.top1_torch


def export_teacher(config: ExportTeacherConfig) -> None:
    """A student with its head as the next teacher."""
    from ..as_teacher import export_teacher

    note(f"written to {export_teacher(config)}")
