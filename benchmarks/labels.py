"""What labels make of the same student: targets out of labels, and a teacher that was fine-tuned with them.

Both are branches as any other, so that supervised rows of ``claims.py`` have the loader, views, steps and optimiser of the rest:
cross-entropy over classes is the objective ``dino`` over as many prototypes, with temperatures of 1.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from rob.common.files import replacing
from rob.common.views.batch import Batch
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import Recipe
from rob.common.weights import tensor_file
from rob.student_train.evaluate.config import FinetuneConfig
from rob.student_train.evaluate.features import labels_of
from rob.student_train.evaluate.finetune import fit_classifier
from rob.student_train.evaluate.labelled import labelled_images
from rob.student_train.evaluate.network import FrozenNetwork
from rob.student_train.kernels.target import DenseTarget, Target
from rob.student_train.targets.branch import RunContext, TargetBranch
from rob.student_train.targets.cached import WINDOW_BLOCKS
from rob.student_train.targets.config import TargetsConfig
from rob.student_train.targets.joined import PairTarget
from rob.student_train.targets.pairing import ViewPlan
from rob.student_train.targets.space import TargetSpace
from rob.teacher_cache.teachers import Teacher

CERTAIN = 50.0
"""Logit of the right class above the others': a probability of 1 in float32."""
UNLIMITED = 1 << 20
"""More views than any run asks for: new ones in every epoch."""


@dataclass(frozen=True, eq=False)
class Labels(TargetsConfig):
    """Targets of a run whose views are drawn by ``recipe``: the images' own labels, the same for all views."""

    recipe: Recipe

    def open(self, run: RunContext) -> "LabelTargets":
        """MisuseError: an image has no label."""
        return LabelTargets(self.recipe, run)


class LabelTargets(TargetBranch):
    """The class of each image, as logits of so many prototypes."""

    kind = source = "labels"
    window_blocks = WINDOW_BLOCKS
    views = UNLIMITED

    def __init__(self, recipe: Recipe, run: RunContext) -> None:
        self.recipe, self.seed, self.device = recipe, run.seed, run.device
        self.labels = labels_of(run.data)
        classes = int(self.labels.max()) + 1
        self.space = TargetSpace(classes, classes, has_embedding=False, teacher_temp=1.0)
        self.description = {"kind": self.kind, "classes": classes, "seed": self.seed}

    @contextmanager
    def targets(
        self, order: np.ndarray, batch_size: int, plan: ViewPlan
    ) -> Iterator[Callable[..., Target | PairTarget | None]]:
        def target(batch: Batch, crops: Sequence[Tensor] = ()) -> Target:
            logits = CERTAIN * F.one_hot(self.labels[torch.as_tensor(batch.image_ids)], self.space.num_prototypes)
            return DenseTarget(logits.float().to(self.device)[:, None].expand(-1, len(plan.targets), -1))

        yield target


def tuned_teacher(
    teacher: Teacher, train: Path, test: Path, view_size: int, config: FinetuneConfig, loader: LoaderConfig, keep: Path
) -> Teacher:
    """``teacher`` fine-tuned on the labels of ``train``: its prototypes are the classifier's rows, and its centre their biases
    with the sign turned. It is on the CPU, where
    the other may be on a GPU; its weights are kept at ``keep``, and read from there where they are.

    MisuseError: no labels, or a teacher of which parts of the tokens are taken.
    """
    if not keep.exists():
        device = next(teacher.parameters()).device
        backbone = copy.deepcopy(teacher.backbone).requires_grad_(True)
        network = replace(FrozenNetwork.teacher(teacher, view_size, device), embed=backbone)
        images, _ = labelled_images(network, train, test, loader)
        classifier = fit_classifier(network, images, config, loader, seed=0)
        tensors = {f"backbone.{name}": tensor for name, tensor in classifier.backbone.state_dict().items()}
        tensors |= {"prototypes": classifier.head.weight, "centre": -classifier.head.bias}
        with replacing(keep) as file:
            file.write(tensor_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {}))
    tensors = load_file(keep)
    tuned = Teacher(
        f"{teacher.name} fine-tuned",
        copy.deepcopy(teacher.backbone).cpu(),
        prototypes=tensors["prototypes"],
        centre=tensors["centre"],
        teacher_temp=1.0,
        mean=teacher.mean,
        std=teacher.std,
        view_size=view_size,
    )
    tuned.load_state_dict(tensors)
    return tuned
