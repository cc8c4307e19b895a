"""What an objective's paper says of a slow copy of the student: without a teacher, where the student itself may stand for it,
or beside one."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CopySettings:
    """``prototypes`` is K (0: none). The copy's momentum goes from ``copy_momentum`` to ``momentum_end`` along a cosine or,
    with ``linear_momentum``, in equal steps, over ``momentum_runs`` times the run: above 1, a run ends before the end of it. A
    ``copy_momentum`` of None: the student makes its own targets. ``own_prototypes``: the copy's embedding is compared with the
    student's prototypes, not with a copy of them. ``teacher_temp`` is reached from ``warmup_teacher_temp`` in
    ``warmup_teacher_temp_epochs`` equal steps, one an epoch. ``centre`` is taken off the targets where no other and no Sinkhorn
    is asked for. Sinkhorn's queue, if any, begins to fill in ``queue_from_epoch`` (from 0): the embeddings of a network that
    learns fast are stale in a few steps, and codes balanced over them give one batch's images all the same one. In the first
    ``freeze_prototypes`` epochs the student's prototypes stay as they are. ``split_batchnorm``: BatchNorm sees so many parts of
    the batch apart, and the copy other parts than the student.
    """

    prototypes: int = 0
    copy_momentum: float | None = 0.996
    momentum_end: float = 1.0
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    linear_momentum: bool = False
    momentum_runs: float = 1.0
    own_prototypes: bool = False
    centre: str = "none"
    queue_from_epoch: int = 0
    freeze_prototypes: int = 0
    split_batchnorm: int | None = None

    def with_momentum(self, momentum: float) -> "CopySettings":
        """Another value at the start; at the end too where the copy's momentum stays, as MoCo's."""
        stays = self.copy_momentum == self.momentum_end
        return replace(self, copy_momentum=momentum, momentum_end=momentum if stays else self.momentum_end)
