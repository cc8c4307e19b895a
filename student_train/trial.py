"""A few steps of a run, tried before it: their time, and the memory that they take. Nothing of the run is touched."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..common.order import block_shuffled_order
from ..common.pace import Pace
from ..common.run import free_memory, seed_step, tuning
from ..common.store.manifest import CHUNK_ROWS
from ..common.views.loader import ViewLoader, resolve_loader
from .checkpoint import save_checkpoint
from .config import PairingConfig
from .crops import Preparation, crop_sets, views_like
from .evaluate.yardstick import MOST_ON_CPU
from .students import check_input_size, describe_student, num_parameters
from .targets.branch import RunContext
from .targets.pairing import plan_views
from .train_config import TrainConfig
from .trainer import Trainer

FEW_IMAGES = 8
"""In the steps that are tried first, so that a step that does not fit the memory is seen before it is made."""
LONG_STEP = 5.0
"""Seconds: a whole step that would take longer is not tried, its time follows from that of a few images."""
WARM_UP, FEWEST, MOST_STEPS = 3, 3, 100
"""Steps that are not counted, and those that are. The first ones of a process are slow: memory is found, kernels are chosen."""
EPOCHS = 2 * MOST_STEPS
PASSES = 3
"""Times as long as a forward pass, a step takes."""
BYTES_A_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in float32."""


@dataclass(frozen=True)
class Trial:
    """What a step of the run's batch takes: ``memory_bytes`` of weights, optimiser and what the backward pass keeps.
    ``parameters`` are the student's, without its head. ``waited`` is the share of the time in which this thread could have run
    and other work had its core.
    """

    seconds: float
    memory_bytes: int
    parameters: int
    checkpoint_seconds: float = 0.0
    waited: float = 0.0

    def seconds_of_run(self, config: TrainConfig, num_images: int, epochs: int) -> float:
        """Of ``epochs`` of a run: steps, checkpoints, and what the student is compared with at its end and in the run."""
        assert isinstance(config.pairing, PairingConfig)
        batch = config.loader.batch_size
        crops = config.pairing.num_global + config.pairing.num_local
        networks = 2 + (epochs / config.knn_every if config.knn_every else 0)
        compared = networks * min(MOST_ON_CPU, num_images) * self.seconds / (batch * crops) / PASSES
        steps = epochs * max(1, num_images // batch) * self.seconds
        checkpoints = epochs / config.checkpoint_every
        if config.checkpoint_minutes:
            checkpoints += steps / 60 / config.checkpoint_minutes
        return steps + checkpoints * self.checkpoint_seconds + compared


def try_steps(
    config: TrainConfig, run: RunContext, seconds: float, tuned: bool = False, saving: float | None = None
) -> Trial:
    """Tries steps of ``config``, which leaves nothing open but ``epochs``, on the images and targets of ``run``, for about
    ``seconds``. ``tuned``: on CUDA as the run makes them, after cuDNN has chosen its algorithms, which takes up to a minute.
    ``saving``: the seconds of a checkpoint, where they were measured before.

    MisuseError as the run itself.
    """
    batch = config.loader.batch_size
    few = min(batch, FEW_IMAGES * (config.accumulate or 1))
    with tuning(tuned and few == batch):
        found, kept = _steps(config, run, few, seconds / 4 if few < batch else seconds, saving)
    memory = found.memory_bytes + kept * (batch - few) // few
    if few < batch and found.seconds * batch / few < LONG_STEP and memory < _free(run.device):
        with tuning(tuned):
            found, _ = _steps(config, run, batch, seconds, found.checkpoint_seconds)
    else:
        found = replace(found, seconds=found.seconds * batch / few)
    return replace(found, memory_bytes=memory)


def _steps(config: TrainConfig, run: RunContext, batch: int, seconds: float, saving: float | None) -> tuple[Trial, int]:
    """Steps of ``batch`` images just as the run makes them, through as many epochs as ``seconds`` have room for: the mean of
    those after the first few. And the bytes that a backward pass keeps.
    """
    branch, device = config.targets.open(run), run.device
    schedule = replace(config.optimiser, warmup_epochs=None)  # any does: the run's own may be longer than these epochs
    few = replace(config.loader, batch_size=batch)
    config = replace(config, loader=few, optimiser=schedule, epochs=EPOCHS, extend=None)
    per_epoch = max(1, run.data.num_images // batch)
    trainer = Trainer(config, branch.space, per_epoch, device, num_images=run.data.num_images, fresh=False)
    branch.follow(trainer.model, per_epoch, EPOCHS)
    assert isinstance(config.pairing, PairingConfig)
    info = describe_student(config.student)
    prepare = Preparation(branch.recipe, info.mean, info.std, device, config.precision)
    loading = resolve_loader(config.loader, device, views_like(config, branch))
    loader = ViewLoader(run.data, branch.recipe, branch.seed, loading)
    pace = Pace(device)  # the host runs ahead as it does in the run: steps are waited for at both ends alone
    done, kept, began, started, queued = 0, 0, _now(device), None, 0.0
    for epoch in count():
        plan = plan_views(config.pairing, branch.views, epoch)
        crops, pair_weights = crop_sets(config, branch.recipe, plan), plan.pair_weights.to(device)
        for views in crops:
            check_input_size(trainer.model.backbone, views.size)
        order = block_shuffled_order(run.data.num_images, CHUNK_ROWS, branch.window_blocks, config.seed, epoch, 0, 1)[
            : per_epoch * batch
        ]
        with branch.targets(order, batch, plan) as target_of:
            for loaded in loader.epoch(order, crops + branch.view_sets(plan)):
                seed_step(config.seed, 0, done)
                loaded = loaded.to(device)
                images = prepare(loaded, crops)
                branch.before_step(done)
                target = target_of(loaded, images)
                with _counted(trainer) if done == 0 else nullcontext({}) as counted:
                    trainer.step(done, images, target, pair_weights)
                branch.after_step(done)
                kept = max(kept, sum(counted.values()))
                pace.step_done()
                done, now = done + 1, time.perf_counter()
                if started is None and (done >= WARM_UP or now - began > LONG_STEP):
                    started, queued = (_now(device), done), seconds_queued()
                    continue
                passed, counting = (now - started[0], done - started[1]) if started else (0.0, 0)
                if counting >= MOST_STEPS or (passed > seconds and counting >= FEWEST) or passed > LONG_STEP + seconds:
                    assert started is not None
                    passed = _now(device) - started[0]
                    memory = BYTES_A_PARAMETER * num_parameters(trainer.model) + kept
                    waited = (seconds_queued() - queued) / passed if device.type == "cpu" else 0.0
                    if saving is None:
                        saving = _seconds_of_a_checkpoint(trainer, branch.state)
                    parameters = num_parameters(trainer.model.backbone)
                    return Trial(passed / counting, memory, parameters, saving, waited), kept
    raise AssertionError("epochs do not end")


def _seconds_of_a_checkpoint(trainer: Trainer, state: dict[str, Any]) -> float:
    """To write one of such a run, where temporary files lie."""
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        parts = {name: part.state_dict() for name, part in (trainer.state | state).items()}
        save_checkpoint(Path(folder, "checkpoint.pt"), parts, {})
        return time.perf_counter() - began


@contextmanager
def _counted(trainer: Trainer) -> Iterator[dict[int, int]]:
    """Bytes of every storage that is kept for the backward pass, the weights left out."""
    weights = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def seconds_queued() -> float:
    """For how long this thread was ready to run, and others had its core; 0 where the system does not say (all but Linux). A
    thread that spins until another one gets a core looks busy, but sooner or later it loses its own."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free(device: torch.device) -> int:
    return free_memory(device) or 1 << 62
