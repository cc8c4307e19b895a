"""``rob report``."""

from ...common.screen import bar, note
from ..report.config import ReportConfig


def report(config: ReportConfig) -> None:
    """One HTML page of runs: curves, scores, neighbours."""
    from ..report.report import report

    with bar("reporting", "steps") as update:
        out = report(config, update)
    note(f"{out}: {out.stat().st_size / 1e6:.1f} MB; it needs no network, open it in a browser")
