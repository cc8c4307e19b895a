"""Stage 2, top to bottom: train a student against the targets of a branch.

data.beton -> loader -> augment -> student -> head -> objective <- target branch
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.device_settings import stored_settings
from ..common.errors import MisuseError
from ..common.exported import StudentInfo
from ..common.images.beton import Beton
from ..common.order import block_shuffled_order
from ..common.own_network import OwnNetwork
from ..common.pace import Pace
from ..common.places import local_path
from ..common.ranks import ALONE, Ranks, from_main, join_ranks, lost_ranks_are_a_failure, once_a_machine, whole_steps
from ..common.run import allow_fast_arithmetic, pick_device, seed_step, versions
from ..common.signals import interrupted_once, uninterrupted
from ..common.store.manifest import CHUNK_ROWS
from ..common.timing import Stopwatch
from ..common.views.loader import Batch, ViewLoader, check_loader, geometry, resolve_loader
from .begun import read_begun
from .bottleneck import advise
from .checkpoint import export_weights
from .collapse import CollapseWatch, remedies
from .config import PairingConfig
from .crops import Preparation, crop_sets, views_like
from .evaluate.yardstick import Yardstick
from .extension import read_parent, take_over
from .kernels.choice import Measured, use_measured
from .loggers.logger import Loggers, check_installed
from .mirror import Mirror
from .own_student import still_tensors, what_moves
from .plan import TrainPlan, opened, plan_run
from .run_folder import RunFolder, read_log
from .students import check_input_size, describe_student
from .targets.pairing import plan_views
from .train_config import TrainConfig
from .trainer import Trainer
from .watch import Watch


@dataclass(frozen=True)
class TrainProgress:
    """What a caller may show, each of which may be left out: every log line as it is written, notes, every step (those done,
    all), what is being waited for, the plan, and that there is a new checkpoint. With ``plan`` the time of a step is measured
    before the run.
    """

    log: Callable[[dict[str, Any], int], None] = lambda line, total_steps: None
    note: Callable[[str], None] = lambda text: None
    step: Callable[[int, int], None] = lambda done, total_steps: None
    say: Callable[[str], None] = lambda text: None
    plan: Callable[[TrainPlan], None] | None = None
    saved: Callable[[], object] = lambda: None


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


def train_student(config: TrainConfig, progress: TrainProgress | None = None) -> TrainResult:
    """Train, or go on from the checkpoint in ``config.out``; leaves the run folder that the README describes. Where that is an
    address, the run's files are also in the folder of the ``weights`` that are returned.

    Under torchrun every rank takes its share of each batch and of the images; rank 0 writes the files.
    Raises MisuseError for settings that cannot be, FailureError when the loss stops being a number, or another rank is lost (the
    last good checkpoint stays).
    """
    progress, mirror = progress or TrainProgress(), Mirror.of(config.out, config.local_dir)
    with lost_ranks_are_a_failure(), interrupted_once():
        ranks = join_ranks()
        if mirror is None:
            return _train(replace(config, out=local_path(config.out)), progress, ranks)
        from_main(mirror.pull)
        result = _train(replace(config, out=mirror.folder), replace(progress, saved=mirror.push), ranks)
        if ranks.is_main:
            mirror.push()
        return result


def _train(config: TrainConfig, progress: TrainProgress, ranks: Ranks) -> TrainResult:
    # ==== what is trained, and against what ====
    device = pick_device(config.device)
    use_what_is_known(device)
    check_loader(config.loader, device)
    check_installed(config.loggers)
    config, context, branch = opened(config, device)
    allow_fast_arithmetic(device, config.precision)
    if config.precision == "auto" and device.type == "cuda":
        progress.note(f"`precision` {context.precision}, since this is {torch.cuda.get_device_name(device)}")
    data = context.data
    freeze = branch.freeze_prototypes if config.freeze_prototypes is None else config.freeze_prototypes
    config = replace(config, freeze_prototypes=freeze)
    plan = plan_run(config, context, branch, ranks, measured=progress.plan is not None, say=progress.say)
    config, pairing = plan.config, plan.config.pairing
    assert isinstance(pairing, PairingConfig) and config.epochs is not None, "the plan leaves nothing open"
    like = views_like(config, branch)
    # The run's settings keep "auto": it may go on elsewhere.
    view_loading = resolve_loader(config.loader, device, like)
    if like not in (None, geometry(view_loading)):
        progress.note(
            f"the targets were cached with the {branch.geometry} loader and are read with {geometry(view_loading)}: "
            "the student's pixels differ slightly from the teacher's; use the same `loader` for exact pairs"
        )
    if config.loader.batch_size % ranks.world_size:
        raise MisuseError(
            f"`batch_size` {config.loader.batch_size} cannot be shared by {ranks.world_size} ranks: take a multiple"
        )

    # ==== how ====
    batch_size = config.loader.batch_size // ranks.world_size  # of this rank
    steps_per_epoch = data.num_images // config.loader.batch_size
    total_steps = steps_per_epoch * config.epochs
    begun = from_main(lambda: read_begun(config.out))
    parent = read_parent(config, branch.description) if config.extend and begun is None else None
    fresh = begun is None and parent is None
    trainer = Trainer(config, branch.space, steps_per_epoch, device, ranks, data.num_images, fresh)
    first = plan_views(pairing, branch.views, epoch=0)
    branch.view_sets(first)  # refuses what it cannot serve, before anything is written
    for crops in crop_sets(config, branch.recipe, first):
        check_input_size(trainer.model.backbone, crops.size)
    info = describe_student(config.student)
    backbone = trainer.model.backbone
    own = backbone if isinstance(backbone, OwnNetwork) else None
    prepare = Preparation(branch.recipe, info.mean, info.std, device, config.precision)
    loader = ViewLoader(data, branch.recipe, branch.seed, replace(view_loading, batch_size=batch_size))
    facts = {
        "student_info": info.to_dict(),
        "data_fingerprint": data.manifest.fingerprint,
        "recipe": branch.recipe.to_dict(),
        "targets": branch.source,
        "branch": branch.description,
        "teacher_temp": trainer.objective.teacher_temp,
        "versions": versions("rob", "torch", "timm"),
    }
    if told := parent.told if parent else (begun or {}).get("parent"):
        facts["parent"] = told
    learns = trainer.objective
    advice = remedies(branch.kind, learns.centre_targets, learns.sinkhorn, learns.mean_entropy)
    collapse = CollapseWatch(branch.space.num_prototypes, total_steps, advice)
    loggers: Loggers | None = None

    def on_log(line: dict[str, Any], total: int) -> None:
        progress.log(line, total)
        if loggers is not None:
            loggers.log(line)
        if "warning" in line:
            progress.note(line["warning"])

    settings = config.to_dict()
    run = RunFolder(config.out, settings, facts, total_steps, on_log, ranks, collapse.look, progress.saved)
    branch.follow(trainer.model, steps_per_epoch, config.epochs)
    if trainer.average and branch.average is not None:
        raise MisuseError("`average`: the momentum copy is one, and exported as such; leave `average` out")
    if batch_size % (parts := trainer.model.parts):
        told = f"`accumulate` {parts} does not divide the {batch_size} images that a step has on a rank"
        if parts != config.accumulate:
            split, whole = parts * ranks.world_size, batch_size * ranks.world_size
            told = f"`split_batchnorm` {split} does not divide the {whole} images of a step"
        raise MisuseError(told)
    state = trainer.state | branch.state
    if parent is not None:
        take_over(state, parent)  # refuses what does not fit, before anything is written
    step = run.resume(state, device)
    if parent is not None:
        run.notes.append(
            f"goes on from step {parent.told['step']} of {parent.run}, for {config.epochs} epochs of a new schedule"
        )
        run.notes += [parent.warning] if parent.warning else []
    if trainer.began:
        run.notes.append(trainer.began)
    for text in run.notes:
        progress.note(text)
    watch = None
    if config.knn_every and ranks.is_main and step < total_steps:
        watch = watching(config, data, device, info, step, progress.note)
    ended = bool(config.patience and from_main(lambda: watch is not None and watch.is_enough))
    if step == total_steps:
        progress.note(f"{config.out} is complete already: nothing to do")
    elif ended:
        progress.note(f"{config.out} has ended already, by `patience`: nothing to do; without it the run goes on")
    elif progress.plan is not None and ranks.is_main:
        progress.plan(plan)
    if own is not None and still_tensors(own) and ranks.is_main and step < total_steps:
        progress.note(f"of {config.student.name} will be {what_moves(own)}")
    progress.step(step, total_steps)

    # ==== the loop ====
    stopwatch, pace, unrehearsed = Stopwatch(device), Pace(device), trainer.compiles
    try:
        if ranks.is_main and step < total_steps and not ended:
            loggers = Loggers(config.loggers, config.out, config.to_dict() | facts, read_log(config.out), progress.note)
        while step < total_steps and not ended:
            epoch, done = divmod(step, steps_per_epoch)
            views = plan_views(pairing, branch.views, epoch)
            pair_weights = views.pair_weights.to(device)
            order = epoch_order(config, data.num_images, branch.window_blocks, epoch, ranks)[done * batch_size :]
            crops = crop_sets(config, branch.recipe, views)
            with whole_steps(ranks) as whole_step, branch.targets(order, batch_size, views) as target_of:
                for batch in timed(loader.epoch(order, crops + branch.view_sets(views)), stopwatch):
                    seed_step(config.seed, ranks.rank, step)
                    with stopwatch("prepare"):
                        batch = batch.to(device)
                        if unrehearsed:
                            once_a_machine(partial(prepare, batch, crops))
                        images = prepare(batch, crops)
                    with whole_step():  # a checkpoint of half a step would be of no step at all
                        with stopwatch("target"):
                            branch.before_step(step)
                            target = target_of(batch, images)
                        if unrehearsed:
                            once_a_machine(partial(trainer.rehearse, images, target, pair_weights))
                            unrehearsed = False
                        with stopwatch("student"):
                            trainer.objective.watching = run.is_logged(step + 1)
                            health, rate = trainer.step(step, images, target, pair_weights)
                            if trainer.moved:
                                branch.after_step(step)
                            pace.step_done()
                        step += 1
                        progress.step(step, total_steps)
                        about_targets = trainer.objective.targets_found
                        run.log(step, epoch, health, rate, len(batch.image_ids), stopwatch, about_targets)
                    if run.is_due and step % steps_per_epoch:
                        run.save(state, step)
            if config.knn_every and (epoch + 1) % config.knn_every == 0:
                if watch is not None:
                    with uninterrupted():  # what the epoch ends with: a run that goes on begins after it
                        found = watch.look(trainer.model.backbone, epoch + 1, step)
                    if loggers is not None:
                        loggers.log({"step": step, **found.to_json()}, "knn")
                if config.patience and step < total_steps:
                    ended = from_main(lambda: watch is not None and watch.is_enough)
                    if ended:
                        progress.note(f"ends after epoch {epoch + 1}: {config.patience} measurements were no better")
            is_last = ended or step == total_steps
            if (epoch + 1) % config.checkpoint_every == 0 or run.is_due or is_last:
                run.save(state, step)

        # ==== what is left of it ====
        if ranks.is_main:
            export_weights(trainer.model.backbone, info, run.weights)
            if own is not None:
                progress.note(f"{run.weights}: of {config.student.name} {what_moves(own)}")
        if watch is not None and watch.sentence:
            progress.note(watch.sentence)
        average = trainer.average.module if trainer.average else branch.average
        if ranks.is_main and average is not None:
            export_weights(average, info, run.average)
    except KeyboardInterrupt:
        run.save(state, step)
        progress.note(f"stopped at step {step} of {total_steps}: run the same command again to go on from there")
        raise KeyboardInterrupt("told") from None
    finally:
        if loggers is not None:
            loggers.close(finished=ended or step == total_steps)
        run.close()
    loss, images_per_second, shares = run.medians()
    advice = advise(shares, branch.kind) if shares else ""
    return TrainResult(run.weights, step, loss, images_per_second, shares, advice)


def watching(
    config: TrainConfig, data: Beton, device: torch.device, info: StudentInfo, step: int, note: Callable[[str], None]
) -> Watch | None:
    """What ``knn_every`` asks for; None: the images are too few. MisuseError: and ``patience`` would go by it."""
    yardstick = Yardstick.of(data, config.student, config.targets, config.seed, device, config.loader, or_rank=True)
    if yardstick is None and config.patience:
        raise MisuseError(
            f"`patience` goes by what `knn_every` measures, and the {data.num_images} images are too few for that"
        )
    if yardstick is None:
        note(f"`knn_every` has nothing to measure by: {data.num_images} images are too few")
        return None
    return Watch(yardstick, config.out, info, step, config.patience, note)


def use_what_is_known(device: torch.device) -> None:
    """Have the loss choose by what ``rob gpu-check`` measured on this GPU, if it did."""
    if device.type == "cuda" and (sizes := stored_settings(device).loss):
        named = [(*size.split("x"), impl) for size, impl in sizes.items()]
        use_measured(torch.cuda.get_device_capability(device), [Measured(int(k), int(d), impl) for k, d, impl in named])


def epoch_order(
    config: TrainConfig, num_images: int, window_blocks: int, epoch: int, ranks: Ranks = ALONE
) -> np.ndarray:
    """The image ids of this rank's share of an epoch's whole batches, in training order: as many steps on any number of ranks."""
    order = block_shuffled_order(
        num_images, CHUNK_ROWS, window_blocks, config.seed, epoch, ranks.rank, ranks.world_size
    )
    return order[: num_images // config.loader.batch_size * config.loader.batch_size // ranks.world_size]


def timed(batches: Iterator[Batch], stopwatch: Stopwatch) -> Iterator[Batch]:
    """The same batches, with the time spent waiting for each under ``data``."""
    while True:
        with stopwatch("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
