"""A few steps of a run, tried before it: their time, and the memory that they take. Nothing of the run is touched."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.order import block_shuffled_order
from ..common.run import seed_step
from ..common.store.manifest import CHUNK_ROWS
from ..common.views.loader import ViewLoader, settled
from .config import PairingConfig
from .crops import Preparation, crop_sets
from .students import check_input_size, describe_student, num_parameters
from .targets.branch import RunContext
from .targets.pairing import plan_views
from .train_config import TrainConfig
from .trainer import Trainer

FEW_IMAGES = 8
"""In the steps that are tried first, so that a step that does not fit the memory is seen before it is made."""
LONG_STEP = 5.0
"""Seconds: a whole step that would take longer is not tried, its time follows from that of a few images."""
BYTES_A_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in float32."""


@dataclass(frozen=True)
class Trial:
    """What a step of the run's batch takes: ``memory_bytes`` of weights, optimiser and what the backward pass keeps.
    ``parameters`` are the student's, without its head.
    """

    seconds: float
    memory_bytes: int
    parameters: int


def try_steps(config: TrainConfig, run: RunContext) -> Trial:
    """Tries steps of ``config``, which leaves nothing open but ``epochs``, on the images and targets of ``run``.

    MisuseError as the run itself.
    """
    batch = config.loader.batch_size
    parts = config.accumulate or 1
    few = min(batch, FEW_IMAGES * parts)
    seconds, memory, kept, parameters = _steps(config, run, few)
    memory += kept * (batch - few) // few
    if few < batch and seconds * batch / few < LONG_STEP and memory < _free(run.device):
        seconds, *_ = _steps(config, run, batch)
        return Trial(seconds, memory, parameters)
    return Trial(seconds * batch / few, memory, parameters)


def _steps(config: TrainConfig, run: RunContext, batch: int, most: int = 6) -> tuple[float, int, int, int]:
    """Seconds of a step of ``batch`` images after the first, bytes that it takes in all, those of them that its backward pass
    keeps, and weights of the student.
    """
    branch, device = config.targets.open(run), run.device
    config = replace(config, loader=replace(config.loader, batch_size=batch), epochs=100)
    trainer = Trainer(
        config, branch.space, max(1, run.data.num_images // batch), device, num_images=run.data.num_images
    )
    branch.follow(trainer.model, max(1, run.data.num_images // batch), 100)
    assert isinstance(config.pairing, PairingConfig)
    plan = plan_views(config.pairing, branch.views, epoch=0)
    crops, weights = crop_sets(config, branch.recipe, plan), plan.pair_weights.to(device)
    for views in crops:
        check_input_size(trainer.model.backbone, views.size)
    info = describe_student(config.student)
    prepare = Preparation(branch.recipe, info.mean, info.std, device, config.precision)
    views_like = branch.geometry if config.pairing.pairing != "cross" else None
    loader = ViewLoader(run.data, branch.recipe, branch.seed, settled(config.loader, device, views_like))
    order = block_shuffled_order(run.data.num_images, CHUNK_ROWS, branch.window_blocks, config.seed, 0, 0, 1)
    order = order[: min(most, len(order) // batch) * batch]
    times, kept = [], 0
    with branch.targets(order, batch, plan) as target_of:
        start = _now(device)
        for number, views in enumerate(loader.epoch(order, crops + branch.view_sets(plan))):
            seed_step(config.seed, 0, number)
            views = views.to(device)
            images = prepare(views, crops)
            branch.before_step(number)
            target = target_of(views, images)
            with _counted(trainer) if number == 0 else _uncounted() as counted:
                trainer.step(number, images, target, weights)
            branch.after_step(number)
            kept = max(kept, sum(counted.values()))
            end = _now(device)
            times.append(end - start)
            start = end
            if len(times) > 1 and sum(times) > LONG_STEP:
                break
    memory = BYTES_A_PARAMETER * num_parameters(trainer.model) + kept
    return min(times[1:] or times), memory, kept, num_parameters(trainer.model.backbone)


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


@contextmanager
def _uncounted() -> Iterator[dict[int, int]]:
    yield {}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free(device: torch.device) -> int:
    return free_memory(device) or 1 << 62


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may take on ``device``; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
