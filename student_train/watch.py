"""The student in the course of a run: measured, the best one kept, and whether it is time to end."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..common.exported import StudentInfo
from ..common.files import replacing
from .checkpoint import BEST_NAME, export_weights
from .evaluate.yardstick import KNN_NAME, Outcome, Yardstick, record, recorded


class Watch:
    """Writes ``knn.jsonl`` and ``student_best.safetensors`` of the run folder ``run``, which goes on from ``step``.

    The best is by k-NN where there are labels, else by the neighbours shared with the teacher, else by RankMe; of equals the
    earlier. ``patience``: so many looks in a row that found no better one are enough; None: it never is.
    """

    def __init__(
        self,
        yardstick: Yardstick,
        run: Path,
        info: StudentInfo,
        step: int,
        patience: int | None,
        note: Callable[[str], None],
    ) -> None:
        self.yardstick, self.run, self.info, self.patience, self.note = yardstick, run, info, patience, note
        self.best, self.best_epoch, self.last, self.looks_since = float("-inf"), 0, float("nan"), 0
        kept = [one for one in recorded(run) if one.step <= step]  # the rest is measured again
        if (run / KNN_NAME).exists():
            with replacing(run / KNN_NAME) as file:
                file.write(b"".join(one.line() for one in kept))
        if (run / BEST_NAME).exists():
            for one in kept:
                self._count(one.outcome.student, one.epoch)

    def look(self, backbone: nn.Module, epoch: int, step: int) -> Outcome:
        """Measure after ``epoch`` epochs, which are ``step`` steps, and keep the student if it is the best so far."""
        found = self.yardstick.measure(backbone)
        record(self.run, epoch, step, found)
        if self._count(found.student, epoch):
            export_weights(backbone, self.info, self.run / BEST_NAME)
        self.note(f"epoch {epoch}: {found.sentence}")
        return found

    def _count(self, score: float, epoch: int) -> bool:
        better = score > self.best
        if better:
            self.best, self.best_epoch = score, epoch
        self.looks_since = 0 if better else self.looks_since + 1
        self.last = score
        return better

    @property
    def is_enough(self) -> bool:
        return self.patience is not None and self.looks_since >= self.patience

    @property
    def sentence(self) -> str:
        """On the best one, where it is not the last; else nothing."""
        if self.best_epoch == 0 or self.looks_since == 0:
            return ""
        of = f"the student of epoch {self.best_epoch}, {self.best:.1f}, where the last has {self.last:.1f}"
        return f"{self.run / BEST_NAME}: {of}"
