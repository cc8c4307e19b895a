"""What targets are made of."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PatchSpace:
    """What targets of patches are made of: ``grid`` x ``grid`` of them a view, of the ``kind`` of ``PatchEncoding``, or of a
    copy of the "student", at its own patches (``grid`` 0). ``dim`` numbers, against K = ``num_prototypes`` where there are some.
    ``centre`` (K,): that of patches in the teacher's own file.
    """

    kind: str
    grid: int
    dim: int
    num_prototypes: int = 0
    ladder: tuple[float, ...] | None = None
    centre: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TargetSpace:
    """What a branch's targets are made of, for the objective to fit its head to.

    ``dim`` is the embedding's width D, ``num_prototypes`` K (0: none); ``has_embedding`` is False for a store of logits,
    ``has_all_logits`` for one of the top k alone, which serves temperatures within its ``ladder``. Where known:
    ``mean_embedding`` (D,) and ``mean_logits`` (K,) over the data set, the ``centre`` (K,) of the teacher's own file, its
    ``prototypes`` (K, D). ``usual_centre`` is what an objective that asks for no centre or Sinkhorn takes off. ``has_copy``: the
    targets of a copy of the student come beside these (``PairTarget``). ``of_student``: there is no teacher, these are the
    student's own or its copy's. ``patches``: what the targets of patches are, where there are some.
    ``members``: of several teachers, the share of each in the loss, and its targets.
    """

    dim: int
    num_prototypes: int
    has_embedding: bool
    teacher_temp: float | None = None
    mean_embedding: Tensor | None = None
    mean_logits: Tensor | None = None
    centre: Tensor | None = None
    prototypes: Tensor | None = None
    has_all_logits: bool = True
    ladder: tuple[float, ...] | None = None
    usual_centre: str = "none"
    has_copy: bool = False
    of_student: bool = False
    patches: PatchSpace | None = None
    members: tuple[tuple[float, "TargetSpace"], ...] = ()
