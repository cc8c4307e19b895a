"""What of a run will not work, in plain words, each with the option that helps."""

from collections.abc import Sequence

import timm
import torch

from .config import PairingConfig
from .objectives import OBJECTIVES
from .optimiser import LR_BATCH_SIZE
from .students import SMALL_SIDE, VIT_FAMILIES, is_small, model_family, stride_of
from .targets.branch import TargetBranch
from .train_config import TrainConfig
from .trainer import reads_patches
from .trial import Trial

LEAST_STEPS = 1_000
"""Below that a student from random weights has been seen no better than they are (benchmarks/first_run.py)."""
LEAST_STEPS_VIT = 10_000
"""In 2,678 a ViT-Tiny was 26 points of k-NN below its teacher, in 4,029 one of 0.3 M weights 16, where CNNs were at most 2
below it (benchmarks/first_run.py); with targets of patches the one of 0.3 M was 9 below, and level after 10,094."""
LEAST_IMAGES_VIT = 10_000 * 32
"""Or as many images, whatever the batch: after 3,510 steps of 128 a ViT-Tiny was 2 points below its teacher, after 4,232 of 64
one of 0.3 M weights 13 (on a GPU, benchmarks/README.md)."""
LEAST_RATE = {"cnn": 2e-3, "mobile": 5e-3, "vit": 1e-3, "vit-conv": 4e-3}
"""Of AdamW in a step, whatever the batch: below it a short run ends where it began. At 5e-3 a MobileNetV2 ended 4 points of k-NN
above itself at 2e-3, a ResNet-18 one below; at 1e-3 a ViT of 0.3 M weights 2 above itself at 5e-4, and one that
begins with convolutions at 4e-3 3 above itself at 1e-3 (benchmarks)."""
BUSY = 0.25
"""Share of a step's time in which none of its threads ran."""


def warnings_of(
    config: TrainConfig,
    steps: int,
    trial: Trial | None,
    free_bytes: int | None,
    branch: TargetBranch,
    stride: int,
    classes: Sequence[str] | None,
) -> list[str]:
    """One sentence each, without its full stop, of a ``config`` that leaves nothing open."""
    found: list[str] = []
    assert isinstance(config.pairing, PairingConfig)
    if steps < LEAST_STEPS:
        found.append(
            f"{steps:,} steps are few: below about {LEAST_STEPS:,} a student is often no better than its random start. "
            "More `epochs`, a smaller `batch_size`, or a longer `budget`"
        )
    elif (
        model_family(config.student.name) in VIT_FAMILIES
        and steps < LEAST_STEPS_VIT
        and steps * config.loader.batch_size < LEAST_IMAGES_VIT
    ):
        assert config.objective is not None
        with_patches = ", and so does a ViT from targets of patches (cached with `patches` grid, `objective` patch)"
        better = "" if reads_patches(config.objective, branch.space) else with_patches
        found.append(
            f"{steps:,} steps are few for a ViT: a CNN, such as `student` mobilenetv3_small_100, learns more in them{better}. "
            "`effort` hours has more"
        )
    rate, usual = config.optimiser.peak * config.loader.batch_size / LR_BATCH_SIZE, config.optimiser.name == "adamw"
    if usual and rate < LEAST_RATE["vit"] / 2 and config.loader.batch_size < LR_BATCH_SIZE:
        found.append(
            f"the rate is scaled down with the batch: {config.optimiser.peak:g} x {config.loader.batch_size}/{LR_BATCH_SIZE} = "
            f"{rate:.2g} in a step. `lr` {LEAST_RATE['vit'] * LR_BATCH_SIZE / config.loader.batch_size:g} would keep it up"
        )
    side = config.student.image_size
    if is_small(config.student) and side > SMALL_SIDE:
        found.append(
            f"the form for images up to {SMALL_SIDE} px, at {side} px, takes two to four times the time and the memory of the "
            "network as timm has it: leave `small_images` out"
        )
    if trial and free_bytes and trial.memory_bytes > 0.9 * free_bytes:
        found.append(
            f"a step takes about {trial.memory_bytes / 1e9:.1f} GB and {free_bytes / 1e9:.1f} GB are free: a smaller "
            "`batch_size` or `image_size`, or `accumulate` 4"
        )
    if trial and trial.waited > BUSY:
        found.append(
            f"other work on this machine took {trial.waited:.0%} of the time of the steps that were tried: the times of this "
            "plan hold while it lasts"
        )
    teacher = parameters_of(str(branch.description.get("teacher", "")))
    if trial and teacher and trial.parameters > teacher:
        found.append(
            f"the student has {trial.parameters / 1e6:.1f} M weights, its teacher {teacher / 1e6:.1f} M: distillation is "
            "for smaller ones (`student`)"
        )
    if classes is not None and len(classes) == 1:
        found.append(
            "all images are of one class: their labels cannot tell whether the student learned. Pack one folder a class"
        )
    found += patch_warnings(config, branch)
    if side < stride:
        found.append(f"images of {side} px are below the {stride}-fold reduction of the network: a larger `image_size`")
    elif config.pairing.num_local and (config.local_size or side // 2) < stride:
        found.append(
            f"local crops are below the {stride}-fold reduction of the network: `num_local` 0, or a `local_size`"
        )
    return found


def patch_warnings(config: TrainConfig, branch: TargetBranch) -> list[str]:
    """What is to be said of targets of patches."""
    assert config.objective is not None
    space, objective, name = branch.space.patches, OBJECTIVES[config.objective.name], config.objective.name
    if space is not None and space.kind != "grid" and not objective.patch_kinds_of(config.objective):
        readers = ", ".join(reader for reader, one in OBJECTIVES.items() if space.kind in one.patch_kinds)
        return [f"`objective` {name} does not read the patches of {branch.source}: {readers} does"]
    if space is None and "prototypes" in objective.patch_kinds and config.objective.patch_weight != 0:
        return [
            "ibot learns from the class token alone: its other half reads what `patches` prototypes caches of a ViT's"
        ]
    side = config.student.image_size // stride_of(config.student)
    reads = reads_patches(config.objective, branch.space) and config.objective.patch_layer is None
    if space is not None and reads and side <= 1 < space.grid:
        return [
            f"the student's map is a single position, which says nothing of the targets' {space.grid} x {space.grid}: a larger "
            "`image_size`, an earlier `patch_layer`, or `objective` embedding"
        ]
    return []


def parameters_of(name: str) -> int | None:
    """Weights of the timm model that a teacher's ``name`` is of; None: it is none."""
    name = name.partition(".")[0]
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
