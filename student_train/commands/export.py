"""``rob export`` and ``rob export-teacher``."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...common.screen import Cell, bar, note, show_table
from ..export.config import ExportConfig
from ..train_config import ExportTeacherConfig
from .of_runs import at_hand

if TYPE_CHECKING:
    from ..export.exported_file import ExportedFile


def export(config: ExportConfig) -> None:
    """A student, or a network for a task, as files for devices, each checked."""
    from ..export.export import export

    with bar("exporting", "files") as update:
        files = export(config, note, update)
    head, scores = _columns(files[0])
    show_table(
        f"{files[0].student}, exported",
        ("file", "MB", "ms, one thread", *head),
        [(entry.file, entry.bytes / 1e6, entry.latency_ms, *scores(entry)) for entry in files],
        named=True,
    )
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent)
    note(f"written to {folder}, and what was measured to export.json there")
    for entry in files:
        shape = " x ".join(map(str, entry.input["shape"]))
        out = entry.output["name"]
        if entry.boxes is None:
            out += f" ({' x '.join(map(str, entry.output['shape'][1:]))})"
        note(f"{entry.file}: {entry.input['form']} image ({shape}) -> {out}")


def _columns(first: "ExportedFile") -> "tuple[tuple[str, ...], Callable[[ExportedFile], tuple[Cell, ...]]]":
    """What is said of agreement, by what comes out."""
    if first.boxes is not None:
        return ("same boxes %", "torch's boxes", "lowest IoU"), _of_boxes
    if first.output["name"] == "logits":
        return ("lowest cosine", "as torch %", "top-1 %", "top-1 of torch %"), _of_logits
    return ("lowest cosine", "k-NN top-1 %", "k-NN of torch %"), _of_features


def _of_boxes(entry: "ExportedFile") -> "tuple[Cell, ...]":
    found = entry.boxes
    if found is None:
        return (None,) * 3
    return 100 * found.same, str(found.boxes), found.lowest_iou and f"{found.lowest_iou:.4f}"


def _of_logits(entry: "ExportedFile") -> "tuple[Cell, ...]":
    found = entry.agreement
    if found is None:
        return (None,) * 4
    return f"{found.lowest_cosine:.4f}", found.same and 100 * found.same, found.top1, found.top1_torch


def _of_features(entry: "ExportedFile") -> "tuple[Cell, ...]":
    found = entry.agreement
    return (None,) * 3 if found is None else (f"{found.lowest_cosine:.4f}", found.knn, found.knn_torch)


def export_teacher(config: ExportTeacherConfig) -> None:
    """A student with its head as the next teacher."""
    from ..as_teacher import export_teacher

    here, _ = at_hand({"config": config}, training=True)
    note(f"written to {export_teacher(**here)}")
