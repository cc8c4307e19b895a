"""The settings: what differs between the runs first, then everything."""

from collections.abc import Sequence

from markupsafe import Markup

from ..run_folder import flat_settings
from .page import caption, details, plain, table, tag
from .run import Run

NO_CHOICES = ("out", "versions", "data_fingerprint", "device", "loggers", "student_info")
"""What tells two runs apart and was not chosen; ``versions`` have a section of their own."""
FIRST = ("student.name", "objective.name", "branch.teacher", "epochs", "loader.batch_size", "optimiser.lr", "seed")


def settings(runs: Sequence[Run]) -> Markup:
    flat = [flat_settings(run.settings) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    names = [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]
    names = [name for name in names if name.split(".")[0] not in NO_CHOICES]
    head = ("setting", *(run.name for run in runs))
    rows = {name: [name, *(plain(values[name]) if name in values else None for values in flat)] for name in names}
    shown = []
    if len(runs) > 1:
        different = [row for row in rows.values() if len({str(value) for value in row[1:]}) > 1]
        shown.append(tag("h3", "What differs"))
        if different:
            shown.append(table(head, different))
            shown.append(caption("Every setting that is not the same in all runs. What is not listed is the same."))
        else:
            shown.append(caption("Nothing: these runs have the same settings."))
    else:
        shown.append(table(head, [rows[name] for name in FIRST if name in rows]))
    shown.append(details(f"All {len(rows)} settings", table(head, rows.values())))
    return Markup("\n").join(shown)
