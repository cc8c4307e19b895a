"""Stage 2, top to bottom: train a student against the targets of a branch.

data.beton -> loader -> augment -> student -> head -> objective <- target branch
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.errors import MisuseError
from ..common.images.beton import Beton
from ..common.order import block_shuffled_order
from ..common.ranks import ALONE, Ranks, join_ranks, left_together, normalise_together, stop_together
from ..common.run import autocast, pick_device, seed_everything, seed_step, versions
from ..common.signals import uninterrupted
from ..common.store.manifest import CHUNK_ROWS
from ..common.timing import Stopwatch
from ..common.views.loader import Batch, LoaderConfig, ViewLoader, ViewSet, check_loader, geometry
from ..common.views.recipes import Recipe
from .bottleneck import advise
from .branches import CachedTargets, TargetBranch, TargetSpace
from .checkpoint import export_weights
from .collapse import CollapseWatch, remedies
from .kernels.target import Target
from .objectives import ObjectiveConfig, build_objective, usual_objective
from .optimiser import OptimiserConfig, Schedule, build_average, build_optimiser
from .pairing import PairingConfig, ViewPlan, choose_pairing, plan_views
from .run_folder import RunFolder
from .students import VIT_PATCH_SMALL, StudentConfig, build_student, check_input_size, describe_student

VIT_PATCH = 16
"""Pixels a side of the usual ViT's patch."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. ``targets`` is the store; None when a branch is handed to ``train_student``.

    ``objective`` None is ``usual_objective``, ``pairing`` None what the objective's paper has (``choose_pairing``).
    ``local_size`` None scales the recipe's local size with the student's image size. ``average`` keeps an exponential moving
    average of the student with that decay beside it. ``clip_grad`` bounds the gradient's norm, 0 leaves it alone.
    ``freeze_prototypes`` keeps the student's prototypes still for so many epochs; None: one where DINO and SwAV do it.
    ``window_mib`` bounds the memory of decompressed targets; ``cache_in_memory`` keeps all of them instead.
    ``checkpoint_every`` is in epochs.
    """

    data: Path
    out: Path
    student: StudentConfig
    targets: Path | None = None
    objective: ObjectiveConfig | None = None
    pairing: PairingConfig | None = None
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    epochs: int = 100
    local_size: int | None = None
    clip_grad: float = 3.0
    freeze_prototypes: int | None = None
    average: float | None = None
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(batch_size=256))
    window_mib: float = 256
    cache_in_memory: bool = False
    log_every: int = 10
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise MisuseError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.average is not None and not 0 < self.average < 1:
            raise MisuseError(f"--average is {self.average:g}, expected a value between 0 and 1, such as 0.999")


@dataclass(frozen=True)
class TrainProgress:
    """What a caller may show: every log line as it is written, and notes; both may be left out."""

    log: Callable[[dict[str, Any], int], None] = lambda line, total_steps: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class TrainResult:
    """``images_per_second`` is the median over the log lines, and so are the ``shares`` of a step's time (bottleneck.py);
    ``advice`` is a sentence on them."""

    weights: Path
    steps: int
    loss: float
    images_per_second: float
    shares: dict[str, float]
    advice: str

    @property
    def data_wait(self) -> float:
        """The share of the time that waited for views."""
        return self.shares.get("data", float("nan"))


class StudentWithHead(nn.Module):
    """The student and its objective (which owns the head) as one module: one optimiser, one checkpoint."""

    def __init__(self, backbone: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.backbone, self.objective = backbone, objective

    def forward(self, crops: list[Tensor], target: Target | None, pair_weights: Tensor) -> Tensor:
        """crops: one (B, n, 3, S, S) tensor a crop size. Each size is one forward pass."""
        features = [self.backbone(c.flatten(0, 1)).unflatten(0, c.shape[:2]) for c in crops]
        return self.objective(torch.cat(features, dim=1), target, pair_weights)


class Trainer:
    """The student, its optimiser and schedule: everything that one step changes."""

    def __init__(
        self,
        config: TrainConfig,
        space: TargetSpace,
        steps_per_epoch: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        num_images: int | None = None,
    ) -> None:
        seed_everything(config.seed)
        assert config.objective is not None and config.pairing is not None, "train_student chooses them"
        backbone = build_student(config.student)
        features: int = backbone.num_features  # type: ignore[assignment]
        objective = build_objective(config.objective, features, space, config.pairing.targets, num_images)
        self.objective: Any = objective
        self.model = StudentWithHead(backbone, objective).to(device).train()
        normalise_together(self.model, device)
        # Without broadcasts of rank 0's buffers: queues and centres are the same on all ranks, and only rank 0 saves.
        alone = ranks.world_size == 1
        self.parallel = self.model if alone else DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimiser = build_optimiser(self.model, config.optimiser, config.loader.batch_size)
        self.schedule = Schedule(self.optimiser, config.optimiser, steps_per_epoch, config.epochs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = build_average(self.model.backbone, config.average) if config.average else None
        if config.freeze_prototypes and not hasattr(objective, "prototypes"):
            raise MisuseError(f"--freeze-prototypes: --objective {config.objective.name} has none, leave it out")
        self.steps_with_still_prototypes = (config.freeze_prototypes or 0) * steps_per_epoch
        self.clip_grad, self.precision, self.device = config.clip_grad or float("inf"), config.precision, device

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, by name."""
        parts = {"model": self.model, "optimiser": self.optimiser, "scaler": self.scaler}
        return parts | ({"average": self.average.module} if self.average else {})

    def step(
        self, number: int, crops: list[Tensor], target: Target | None, pair_weights: Tensor
    ) -> tuple[Tensor, float]:
        """Step ``number`` (from 0): (loss, gradient norm) as a (2,) tensor on the device, and the learning rate."""
        rate = self.schedule.step(number)
        with autocast(self.device, self.precision):
            loss = self.parallel(crops, target, pair_weights)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        if number < self.steps_with_still_prototypes:  # before the norm: what does not move has no part in it
            for parameter in self.model.objective.prototypes.parameters():  # type: ignore[union-attr]
                parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update(self.model.backbone, number)
        if self.scaler.is_enabled():  # fp16 skips a step whose gradient overflowed: no reason to stop
            norm = torch.where(norm.isfinite(), norm, 0.0)
        return torch.stack([loss.detach(), norm]), rate


def train_student(
    config: TrainConfig, branch: TargetBranch | None = None, progress: TrainProgress | None = None
) -> TrainResult:
    """Train, or go on from the checkpoint in ``config.out``; leaves the run folder that the README describes.

    Under torchrun every rank takes its share of each batch and of the images; rank 0 writes the files.
    Raises MisuseError for settings that cannot be, FailureError when the loss stops being a number (the last good
    checkpoint stays).
    """
    progress = progress or TrainProgress()

    # ==== what is trained, and against what ====
    ranks = join_ranks()
    device = pick_device(config.device)
    autocast(device, config.precision)
    check_loader(config.loader, device)
    data = Beton(config.data)
    if branch is None:
        if config.targets is None:
            raise MisuseError(
                "no targets: pass --targets CACHE.zarr (made by rob cache-teacher), or --targets online with a teacher"
            )
        branch = CachedTargets(config.targets, data, device, config.window_mib, config.cache_in_memory)
    # A copy of the student sees what the student sees.
    fresh = False if branch.description["kind"] == "momentum" else None
    objective = config.objective or ObjectiveConfig(usual_objective(branch.space))
    pairing = config.pairing or choose_pairing(objective.name, branch.recipe, branch.views, fresh=fresh)
    freeze = branch.freeze_prototypes if config.freeze_prototypes is None else config.freeze_prototypes
    config = replace(config, objective=objective, pairing=pairing, freeze_prototypes=freeze)
    if pairing.pairing != "cross" and branch.geometry not in (None, geometry(config.loader)):
        progress.note(
            f"the targets were cached with the {branch.geometry} loader and are read with {geometry(config.loader)}: "
            "the student's pixels differ slightly from the teacher's; use the same --loader for exact pairs"
        )
    if config.loader.batch_size % ranks.world_size:
        raise MisuseError(
            f"--batch-size {config.loader.batch_size} cannot be shared by {ranks.world_size} ranks: take a multiple"
        )
    if data.num_images < config.loader.batch_size:
        raise MisuseError(
            f"--batch-size {config.loader.batch_size} is more than the {data.num_images} images of {data.path}"
        )

    # ==== how ====
    batch_size = config.loader.batch_size // ranks.world_size  # of this rank
    steps_per_epoch = data.num_images // config.loader.batch_size
    total_steps = steps_per_epoch * config.epochs
    trainer = Trainer(config, branch.space, steps_per_epoch, device, ranks, data.num_images)
    first = plan_views(pairing, branch.views, epoch=0)
    branch.view_sets(first)  # refuses what it cannot serve, before anything is written
    for crops in crop_sets(config, branch, first):
        check_input_size(trainer.model.backbone, crops.size)
    info = describe_student(config.student)
    prepare = Preparation(branch.recipe, info.mean, info.std, device)
    loader = ViewLoader(data, branch.recipe, branch.seed, replace(config.loader, batch_size=batch_size))
    stopwatch = Stopwatch(device)
    facts = {
        "student_info": info.to_dict(),
        "data_fingerprint": data.manifest.fingerprint,
        "recipe": branch.recipe.to_dict(),
        "branch": branch.description,
        "versions": versions("rob", "torch", "timm"),
    }
    sinkhorn, mean_entropy = (getattr(trainer.objective, name, None) for name in ("sinkhorn", "mean_entropy"))
    advice = remedies(branch.description["kind"], objective.centre, sinkhorn, mean_entropy)
    collapse = CollapseWatch(branch.space.num_prototypes, total_steps, advice)

    def on_log(line: dict[str, Any], total: int) -> None:
        progress.log(line, total)
        if "warning" in line:
            progress.note(line["warning"])

    run = RunFolder(config.out, asdict(config), facts, total_steps, on_log, ranks, collapse.look)
    branch.follow(trainer.model, steps_per_epoch, config.epochs)
    if trainer.average and branch.average is not None:
        raise MisuseError("--average: the momentum copy is one, and exported as such; leave --average out")
    state = trainer.state | branch.state
    step = run.resume(state, device)
    if step == total_steps:
        progress.note(f"{config.out} is complete already: nothing to do")

    # ==== the loop ====
    try:
        while step < total_steps:
            epoch, done = divmod(step, steps_per_epoch)
            plan = plan_views(pairing, branch.views, epoch)
            pair_weights = plan.pair_weights.to(device)
            order = epoch_order(config, data.num_images, branch.window_blocks, epoch, ranks)[done * batch_size :]
            crops = crop_sets(config, branch, plan)
            with left_together(ranks) as held_back, branch.targets(order, batch_size, plan) as targets:
                for batch in timed(loader.epoch(order, crops + branch.view_sets(plan)), stopwatch):
                    seed_step(config.seed, ranks.rank, step)
                    with stopwatch("prepare"):
                        batch = batch.to(device)
                        images = prepare(batch, crops)
                    with uninterrupted():  # a checkpoint of half a step would be of no step at all
                        with stopwatch("target"):
                            branch.before_step(step)
                            target = targets.next(batch, images)
                        with stopwatch("student"):
                            trainer.objective.watching = run.is_logged(step + 1)
                            health, rate = trainer.step(step, images, target, pair_weights)
                            branch.after_step(step)
                        step += 1
                        run.log(
                            *(step, epoch, health, rate, len(batch.image_ids), stopwatch),
                            trainer.objective.targets_found,
                        )
                    stop_together(held_back, ranks)
            if (epoch + 1) % config.checkpoint_every == 0:
                run.save(state, step)

        # ==== what is left of it ====
        run.save(state, step)
        if ranks.is_main:
            export_weights(trainer.model.backbone, info, run.weights)
        average = trainer.average.module if trainer.average else branch.average
        if ranks.is_main and average is not None:
            export_weights(average, info, run.average)
    except KeyboardInterrupt:
        run.save(state, step)
        progress.note(f"stopped at step {step} of {total_steps}: run the same command again to go on from there")
        raise
    finally:
        run.close()
    loss, images_per_second, shares = run.medians()
    advice = advise(shares, branch.description["kind"]) if shares else ""
    return TrainResult(run.weights, total_steps, loss, images_per_second, shares, advice)


def epoch_order(
    config: TrainConfig, num_images: int, window_blocks: int, epoch: int, ranks: Ranks = ALONE
) -> np.ndarray:
    """The image ids of this rank's share of an epoch's whole batches, in training order: as many steps on any number of ranks."""
    order = block_shuffled_order(
        num_images, CHUNK_ROWS, window_blocks, config.seed, epoch, ranks.rank, ranks.world_size
    )
    return order[: num_images // config.loader.batch_size * config.loader.batch_size // ranks.world_size]


def crop_sets(config: TrainConfig, branch: TargetBranch, plan: ViewPlan) -> tuple[ViewSet, ...]:
    """The student's crops: the global ones at its image size, then the local ones.

    By default those are smaller in the recipe's proportion, to the nearest side that a transformer's patches fill.
    """
    size = config.student.image_size
    sets = (ViewSet(plan.globals, size),)
    if not plan.locals:
        return sets
    local = branch.recipe.local_crop
    if local is None:
        raise MisuseError(f"the recipe {branch.recipe.name} of the targets has no local crops: use --num-local 0")
    if config.local_size is not None and config.local_size > size:
        raise MisuseError(
            f"--local-size {config.local_size} is more than --image-size {size}: local crops are the smaller ones"
        )
    patch = VIT_PATCH_SMALL if config.student.small_images else VIT_PATCH
    patches = max(1, round(size * local.size / branch.recipe.global_crops[0].size / patch))
    return (*sets, ViewSet(plan.locals, config.local_size or patches * patch))


class Preparation:
    """Turns a batch's bytes into the student's normalised crops on the device."""

    def __init__(self, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    def __call__(self, batch: Batch, sets: tuple[ViewSet, ...]) -> list[Tensor]:
        """One (B, n, 3, S, S) float32 tensor a set."""
        crops = []
        for number, views in enumerate(sets):
            kind = self.recipe.global_crops[0] if number == 0 else self.recipe.local_crop
            assert kind is not None
            crops.append(batch.augment(number, views.size / kind.size, self.mean, self.std))
        return crops


def timed(batches: Iterator[Batch], stopwatch: Stopwatch) -> Iterator[Batch]:
    """The same batches, with the time spent waiting for each under ``data``."""
    while True:
        with stopwatch("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
