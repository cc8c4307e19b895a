"""``rob compare``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...common.config import Overwrite
from ...common.errors import MisuseError
from ...common.files import refuse_existing
from ...common.screen import Cell, bar, note, show_table
from ...common.settings import Setting

if TYPE_CHECKING:
    from ..export.exported_file import ExportedFile

EXPORTED: dict[str, Callable[["ExportedFile"], Cell]] = {
    "MB": lambda entry: entry.bytes / 1e6,
    "ms, one thread": lambda entry: entry.latency_ms,
    "agreement": lambda entry: entry.score if entry.score is None else f"{entry.score:.4f}",
}
"""What is shown of an exported file."""
FEW = 3
"""Runs that are columns of the table; more are its rows."""


def compare(
    runs: Annotated[list[Path], Setting("Run folders that rob eval has measured.", argument="RUN")],
    out: Annotated[Path, Setting("The plot to draw; its numbers go beside it as .json.")] = Path("compare.png"),
    overwrite: Overwrite = False,
) -> None:
    """Runs side by side: results, size, latency, speed."""
    from ..evaluate.compare import all_tasks, names_of, summarise, write_comparison
    from ..evaluate.results import not_comparable, of_weights, others_left_out, read_results

    if out.suffix != ".png":
        raise MisuseError(f"`out` {out}: the plot is a PNG, name it {out.with_suffix('.png')}")
    for path in (out, out.with_suffix(".json")):
        refuse_existing(path, overwrite)
    summaries = []
    with bar("measuring", "runs") as update:
        for run in runs:
            summaries.append(summarise(run))
            update(len(summaries), len(runs))
    tasks = all_tasks(summaries)
    write_comparison(summaries, out)
    names = names_of([s.run for s in summaries])
    measures: list[tuple[str, list[Cell]]] = [
        ("student", [s.student for s in summaries]),
        ("parameters, M", [s.parameters / 1e6 for s in summaries]),
        ("MACs, M", [s.macs / 1e6 for s in summaries]),
        ("CPU ms, one thread", [s.cpu_ms for s in summaries]),
        ("CUDA ms", [s.cuda_ms for s in summaries]),
        ("training images/s", [s.train_images_per_second for s in summaries]),
    ]
    if len(runs) <= FEW:
        measures += [
            (f"{file}, {title}", [value(s.exports[file]) if file in s.exports else None for s in summaries])
            for file in dict.fromkeys(file for s in summaries for file in s.exports)
            for title, value in EXPORTED.items()
        ]
    measures += [
        (task if task.endswith("%") else f"{task} %", [s.scores.get(task) for s in summaries]) for task in tasks
    ]
    measures = [(title, values) for title, values in measures if any(value is not None for value in values)]
    if len(runs) <= FEW:
        show_table("runs", ("", *names), [(title, *values) for title, values in measures])
    else:
        titles, columns = zip(*measures, strict=True)
        show_table("runs", ("run", *titles), list(zip(names, *columns, strict=True)), named=True)
        exported = [
            (f"{name}/{file}", *(value(entry) for value in EXPORTED.values()))
            for name, s in zip(names, summaries, strict=True)
            for file, entry in s.exports.items()
        ]
        if exported:
            show_table("exported files", ("file", *EXPORTED), exported, named=True)
    results = {}
    for name, run, s in zip(names, runs, summaries, strict=True):
        results[name] = of_weights(read_results(run), s.weights)
        if s.left_out:
            note(others_left_out(name, s.left_out))
    for sentence in not_comparable(results):
        note(sentence)
    note(f"drawn to {out}")
