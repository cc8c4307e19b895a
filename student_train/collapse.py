"""Whether the targets still tell images apart: without a frozen teacher, both branches may agree on something empty.

==================================  ============================================  =================================
all images at one prototype         the entropy of the mean target nears 0        DINO, 2104.14294, section 5.3
all prototypes alike                the mean entropy of a target nears log K      the same
all embeddings alike                their deviation over the batch nears 0        SimSiam, 2011.10566, section 4.1
==================================  ============================================  =================================
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.target import DenseTarget, EmbeddingTarget, Target, widened

MOST_ROWS = 256
"""Rows of a batch that are examined."""
ROWS_AT_ONCE = 32
"""So that K = 65536 takes a few MB."""

PATIENCE = 3
"""Log lines in a row that must look alike."""
GRACE = 0.1
"""Share of the run in which a fresh head is expected to say the same of every image."""

LEAST_SPREAD = 0.05
"""Of the mean target's entropy as a share of log K, and of the embeddings' deviation."""
MOST_ENTROPY = 0.97
"""Of a target, as a share of log K. Too warm a teacher settles at .98 without getting nearer; healthy runs of
benchmarks/momentum.py stay below .93."""


@torch.no_grad()
def entropies(target: Target, temp: float, centre: Tensor | None) -> dict[str, Tensor]:
    """Of q = softmax((t - c) / temp), in nats, over at most ``MOST_ROWS`` views of this rank: scalars on the target's device.

    ``target_entropy`` is the mean of H(q), ``mean_target_entropy`` H of the mean q, which n rows bound by log n.
    Nothing for a store of the top k logits: its targets are a frozen teacher's.
    """
    if not isinstance(target, EmbeddingTarget | DenseTarget):
        return {}
    rows = (target.embedding if isinstance(target, EmbeddingTarget) else target.logits).flatten(0, 1)[:MOST_ROWS]
    own, total = [], torch.zeros((), device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for part in rows.split(ROWS_AT_ONCE):
            logits = part.to(widened(part.dtype))
            if isinstance(target, EmbeddingTarget):
                logits = logits @ target.matrix.to(logits.dtype).T
            log_q = F.log_softmax((logits if centre is None else logits - centre) / temp, dim=1)
            q = log_q.exp()
            own.append(-(q * log_q).sum(1))
            total = total + q.sum(0)
    mean = total / len(rows)
    return {"target_entropy": torch.cat(own).mean(), "mean_target_entropy": torch.special.entr(mean).sum()}


@torch.no_grad()
def spread(embedding: Tensor) -> dict[str, Tensor]:
    """``target_std`` of unit rows (B, G, D): the root of their variance summed over D. 1: evenly over the sphere; 0: all the
    same.
    """
    rows = embedding.flatten(0, 1)[:MOST_ROWS].float()
    return {"target_std": rows.std(0, correction=0).square().sum().sqrt()}


class CollapseWatch:
    """Looks at a run's log lines and says once that the targets near collapse. ``num_prototypes`` is K, 0 without any;
    ``advice`` is what to do about each of them (``remedies``).
    """

    def __init__(self, num_prototypes: int, total_steps: int, advice: Mapping[str, str]) -> None:
        self.advice = advice
        self.log_k = math.log(num_prototypes) if num_prototypes else math.nan
        self.first_step = GRACE * total_steps
        self.suspicion, self.times, self.told = "", 0, False

    def look(self, line: Mapping[str, float]) -> str | None:
        """A sentence with the remedy, when ``PATIENCE`` lines in a row call for the same one."""
        suspicion = self._suspicion(line) if line["step"] > self.first_step else ""
        self.times = self.times + 1 if suspicion and suspicion == self.suspicion else 1
        self.suspicion = suspicion
        if not suspicion or self.told or self.times < PATIENCE:
            return None
        self.told = True
        found = ", ".join(f"{name} {line[name]:.3g}" for name in FIELDS if name in line)
        return f"step {line['step']}: {suspicion} ({found}). {self.advice[suspicion]}"

    def _suspicion(self, line: Mapping[str, float]) -> str:
        if "target_std" in line:
            return ALIKE if line["target_std"] < LEAST_SPREAD else ""
        if "target_entropy" not in line:
            return ""
        if line["mean_target_entropy"] < LEAST_SPREAD * self.log_k:
            return ONE_PROTOTYPE
        return UNIFORM if line["target_entropy"] > MOST_ENTROPY * self.log_k else ""


FIELDS = ("target_entropy", "mean_target_entropy", "target_std")
"""Of a log line."""

ONE_PROTOTYPE = "the targets near collapse, with nearly all images at one prototype"
UNIFORM = "the targets near collapse, with all prototypes nearly alike for every image"
ALIKE = "the targets near collapse, with nearly the same embedding for every image"


def remedies(kind: str, centre: str | None, sinkhorn: str | None, mean_entropy: float | None) -> dict[str, str]:
    """What to do about each, in options that the run takes and does not have already.

    ``kind`` of the target branch: cached, online or momentum. A teacher's targets are what they are, whatever the student
    learns: of them only how they are read can change. ``centre`` is the one asked for; ``sinkhorn`` and ``mean_entropy`` are
    the objective's, None where it has no such option.
    """
    copied = kind == "momentum"
    evened, sharpened = ["a higher `teacher_temp`"], ["a lower `teacher_temp`"]
    if sinkhorn == "none":
        evened += ["`sinkhorn` batch" if centre is None else f"`sinkhorn` batch in place of `centre_targets` {centre}"]
        evened += ["`centre_targets` calibration"] if kind == "cached" and centre is None else []
    if copied:
        evened += ["a higher `mean_entropy`" if mean_entropy else "`mean_entropy` 1"]
        sharpened += ["a lower `lr`", "one more of `freeze_prototypes`", "fewer `prototypes`"]
    alike = "Lower `lr`, lengthen `warmup_epochs`, take `copy_momentum` nearer 1, or a longer `queue`."
    of_a_teacher = (
        "Look at them with rob inspect --sheet: is this the teacher's `checkpoint`, and are these its images?"
    )
    return {
        ONE_PROTOTYPE: f"Even them out: {_either(evened)}.",
        UNIFORM: f"Sharpen them: {_either(sharpened)}.",
        ALIKE: alike if copied else of_a_teacher,
    }


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
