"""Did it work? A student against its own random start, raw pixels and its teacher, on some of the images it was trained on.

With labels by k-NN, a fifth of each class held out; without, by how many of an image's nearest neighbours the teacher has among
its own. Worse than random is no rarity: a network learns first what all targets have in common.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.errors import FailureError, MisuseError
from ...common.files import append_to, read_regular, replacing
from ...common.images.beton import Beton
from ...common.look.neighbours import unit_vectors
from ...common.records import DamagedError, sealed, typed, unsealed
from ...common.run import exact_products
from ...common.store.codec import decode
from ...common.store.reader import TargetStore
from ...common.views.config import LoaderConfig
from ..run_folder import LARGEST_LOG, read_log
from ..start import begin
from ..students import StudentConfig, describe_student
from ..targets.config import TargetsConfig
from .features import Features
from .knn import knn
from .labelled import HELD_OUT
from .network import FrozenNetwork
from .rank import rank_me
from .subsets import hold_out

MOST_IMAGES, MOST_ON_CPU = 5_000, 1_500
FEWEST_IMAGES = 50
"""Fewer say nothing."""
FEWEST_OF_A_CLASS = 5
NEIGHBOURS = 10
QUERIES = 500
BATCH = 64
"""Images of a forward pass, at most: one of a run's may take its batch in parts, or be one of many ranks, to fit its memory."""
K = 20
OUTCOME_NAME, KNN_NAME = "outcome.json", "knn.jsonl"
CLEARLY = 10.0
"""Points above the random start from which nobody has to wonder."""


@dataclass(frozen=True)
class Outcome:
    """In percent, each None where there is none. ``by_labels``: k-NN top-1; ``by_rank``: effective ranks; else neighbours shared
    with the teacher.

    ``rank`` is the student's effective rank (RankMe), ``agreement`` its neighbours shared with the teacher, whatever the rest
    goes by. ``start`` is of what the student began with, where that was not random and is still there.
    """

    by_labels: bool
    num_images: int
    student: float
    random: float
    pixels: float
    teacher: float | None
    by_rank: bool = False
    rank: float | None = None
    agreement: float | None = None
    start: float | None = None

    @property
    def sentence(self) -> str:
        """In the course of a run."""
        what, unit = (
            ("k-NN", " %") if self.by_labels else ("RankMe", "") if self.by_rank else ("shared neighbours", " %")
        )
        began = "random start" if self.start is None else "start"
        found = f"{what} {self.student:.1f}{unit}, {began} {self.before:.1f}, pixels {self.pixels:.1f}"
        if self.by_labels and self.agreement is not None:
            found += f"; neighbours shared with the teacher {self.agreement:.1f} %"
        return found if self.by_rank or self.rank is None else f"{found}; RankMe {self.rank:.1f}"

    @property
    def title(self) -> str:
        what = "effective rank" if self.by_rank else f"k-NN top-1, {HELD_OUT:.0%} of each class held out" if self.by_labels else (
            f"of an image's {NEIGHBOURS} nearest, those that are the teacher's too"
        )  # fmt: skip
        return f"did it work? {what}, {self.num_images:,} of the training images"

    @property
    def before(self) -> float:
        """Of the student before its training."""
        return self.random if self.start is None else self.start

    @property
    def worked(self) -> bool:
        return self.student > self.before

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """A line of ``knn.jsonl``: what was found after ``epoch`` epochs, which are ``step`` steps."""

    step: int
    epoch: int
    outcome: Outcome

    def line(self) -> bytes:
        """As it is in the file."""
        return sealed({"epoch": self.epoch, "step": self.step, **self.outcome.to_json()})


class Yardstick:
    """What a student is measured against; each of the others is measured once."""

    def __init__(
        self,
        data: Beton,
        student: StudentConfig,
        stores: Sequence[TargetStore],
        seed: int,
        device: torch.device,
        loader: LoaderConfig,
    ) -> None:
        most = MOST_ON_CPU if device.type == "cpu" else MOST_IMAGES
        self.image_ids = np.unique(np.linspace(0, data.num_images - 1, min(most, data.num_images)).astype(np.int64))
        self.loader = LoaderConfig(loader.backend, min(BATCH, loader.batch_size), loader.workers)
        self.data, self.device, self.student, self.seed = data, device, student, seed
        self.teacher_rows = joint_features(stores, self.image_ids) if stores else None
        self.labels = usable_labels(data, self.image_ids)
        self._others: dict[str, float] = {}

    @classmethod
    def of(
        cls,
        data: Beton,
        student: StudentConfig,
        targets: TargetsConfig,
        seed: int,
        device: torch.device,
        loader: LoaderConfig,
        or_rank: bool = False,
    ) -> "Yardstick | None":
        """None: the images are too few, or have neither labels nor a store of targets to go by, and no rank is asked for."""
        stores = [TargetStore.open(path) for path in targets.stores]
        if data.num_images < FEWEST_IMAGES:
            return None
        made = cls(data, student, stores, seed, device, loader)
        return None if made.by_rank and not or_rank else made

    @property
    def by_rank(self) -> bool:
        """Whether there is nothing else to go by."""
        return self.labels is None and self.teacher_rows is None

    def measure(self, backbone: nn.Module) -> Outcome:
        """Of the student's network as it is now, which is left in the mode it had."""
        info = describe_student(self.student)
        mine = FrozenNetwork("student", backbone, info.image_size, info.mean, info.std, "", self.device)
        if not self._others:
            # what is drawn for it is not missed elsewhere: a step of training seeds itself
            random = FrozenNetwork.random_student(self.student, self.seed, self.device)
            pixels, start = FrozenNetwork.pixels(32, self.device), self._start()
            networks = {"random": random, "pixels": pixels} | ({"start": start} if start else {})
            self._others = {name: self._score(self._features(network)) for name, network in networks.items()}
            if self.labels is not None and self.teacher_rows is not None:
                self._others["teacher"] = self._score(self.teacher_rows.to(self.device))
        others = self._others
        rows = self._features(mine)
        score, rank, agreement = self._score(rows), round(rank_me(rows), 2), None
        if self.teacher_rows is not None:
            agreement = round(100 * shared_neighbours(rows, self.teacher_rows.to(rows.device)), 2)
        measured = (score, others["random"], others["pixels"], others.get("teacher"))
        by_labels = self.labels is not None
        return Outcome(by_labels, len(self.image_ids), *measured, self.by_rank, rank, agreement, others.get("start"))

    def _start(self) -> FrozenNetwork | None:
        """What the student began with; None: at random, or with a file that a run which went on has no more."""
        if self.student.init is None:
            return None
        network = FrozenNetwork.random_student(self.student, self.seed, self.device)
        assert isinstance(network.embed, nn.Module)
        try:
            begin(network.embed, self.student)
        except MisuseError:
            return None
        return network

    @torch.no_grad()
    def _features(self, network: FrozenNetwork) -> Tensor:
        module = network.embed if isinstance(network.embed, nn.Module) else None
        training = module is not None and module.training
        if module is not None:
            module.eval()
        try:
            batches = network.centred(self.data, self.loader, self.image_ids)
            return torch.cat([network.embed(images).float() for _, images in batches])  # all on its device
        finally:
            if module is not None:
                module.train(training)

    def _score(self, rows: Tensor) -> float:
        if self.labels is not None:
            features = Features(rows, self.labels.to(rows.device))
            kept, tested = hold_out(features, HELD_OUT, 0, "")
            train = features.rows(kept)
            return round(knn(train, features.rows(tested), k=min(K, len(train))).top1, 2)
        if self.teacher_rows is None:
            return round(rank_me(rows), 2)
        return round(100 * shared_neighbours(rows, self.teacher_rows.to(rows.device)), 2)


def shared_neighbours(rows: Tensor, others: Tensor, count: int = NEIGHBOURS, queries: int = QUERIES) -> float:
    """Mean share of the ``count`` nearest rows (by cosine) of ``rows`` (N, D) that are among those of ``others`` (N, E)."""
    asked = torch.linspace(0, len(rows) - 1, min(queries, len(rows))).long().to(rows.device)

    def nearest(values: Tensor) -> Tensor:
        unit = F.normalize(values - values.mean(0), dim=1)
        with exact_products():
            cosines = unit[asked] @ unit.T
        cosines[torch.arange(len(asked), device=rows.device), asked] = -torch.inf
        return cosines.topk(count).indices

    mine, theirs = nearest(rows), nearest(others)
    return (mine[:, :, None] == theirs[:, None, :]).any(2).sum().item() / mine.numel()


def joint_features(stores: Sequence[TargetStore], image_ids: np.ndarray) -> Tensor:
    """(n, D or K): those of the teacher; of several, side by side, as unit rows so that each has as much to say."""
    rows = [teacher_features(store, image_ids) for store in stores]
    return rows[0] if len(rows) == 1 else torch.cat([F.normalize(each, dim=1) for each in rows], dim=1)


def teacher_features(store: TargetStore, image_ids: np.ndarray) -> Tensor:
    """(n, D or K): the mean over the cached views of what the teacher said."""
    return (
        unit_vectors(decode(store.encoding, store.pooled().rows(image_ids)), store.manifest.num_prototypes)
        .float()
        .mean(1)
    )


def usable_labels(data: Beton, image_ids: np.ndarray) -> Tensor | None:
    """Those of the images; None: some have none, a class has too few, or they are all the same."""
    if data.labels is None:
        return None
    labels = torch.from_numpy(np.asarray(data.labels)[image_ids].astype(np.int64))
    found, counts = labels.unique(return_counts=True)
    known = int(found[0]) >= 0  # -1 is an image without
    return labels if known and len(counts) > 1 and int(counts.min()) >= FEWEST_OF_A_CLASS else None


def verdict(outcome: Outcome, run: Path, steps: int, least_steps: int, rate: float, least_rate: float) -> list[str]:
    """What to say of it: nothing of a student that learned, else the likely cause and the option that helps."""
    said = []
    if outcome.teacher is not None and outcome.teacher <= outcome.pixels:
        said.append(
            f"the teacher ({outcome.teacher:.1f} %) is no better than raw pixels ({outcome.pixels:.1f} %) here, and its student "
            "will hardly be: cache with a larger `view_size`, or another `teacher`"
        )
    if outcome.worked and (outcome.student >= outcome.random + CLEARLY or not outcome.by_labels):
        if outcome.by_labels and outcome.student < outcome.pixels and not said:
            said.append(
                f"the student ({outcome.student:.1f} %) is BELOW RAW PIXELS ({outcome.pixels:.1f} %), and of no use yet: more "
                "`epochs`, or a longer `budget`; a ViT needs more steps than a CNN"
            )
        return said
    losses = [line["loss"] for line in read_log(run)]
    if steps < least_steps:
        cause = f"{steps:,} steps are few. More `epochs`, a smaller `batch_size`, or a longer `budget`"
    elif rate < least_rate:
        cause = f"the rate was {rate:.2g} in a step. A higher `lr`"
    elif len(losses) > 1 and losses[-1] > 0.9 * losses[0]:
        cause = f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}. Another `lr`, or a lower `teacher_temp`"
    else:
        cause = (
            "the views may show too little of the image. Look at them with rob views, raise `global_scale`, cache again"
        )
    found, against = "little better than random weights", outcome.random
    if not outcome.worked:
        found = "NO BETTER THAN " + ("ITS RANDOM START" if outcome.start is None else "WHAT IT BEGAN WITH")
        against = outcome.before
    return [f"the student is {found} ({outcome.student:.1f} % against {against:.1f} %): {cause}", *said]


def write_outcome(run: Path, outcome: Outcome) -> None:
    """``outcome.json`` of the run's folder."""
    with replacing(run / OUTCOME_NAME) as file:
        file.write(sealed(outcome.to_json(), indent=2))


def record(run: Path, epoch: int, step: int, outcome: Outcome) -> None:
    """Adds a line to ``knn.jsonl``: the student in the course of the run."""
    with append_to(run / KNN_NAME) as file:
        file.write(Measured(step, epoch, outcome).line())


def recorded(run: Path) -> list[Measured]:
    """The lines of ``knn.jsonl``, without one that was cut off. FailureError: one is damaged."""
    path, found = run / KNN_NAME, []
    lines = read_regular(path, LARGEST_LOG).splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            values = unsealed(line, dict[str, Any])
            step, epoch = typed(int, values.pop("step", None), "step"), typed(int, values.pop("epoch", None), "epoch")
            found.append(Measured(step, epoch, typed(Outcome, values)))
        except DamagedError as problem:
            raise FailureError(f"{path}: line {number} {problem}: delete that line") from None
    return found
