"""One step of training."""

import warnings
import weakref
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.batchnorm import join_batchnorms
from ..common.device_settings import stored_settings
from ..common.errors import MisuseError
from ..common.patches import has_tokens
from ..common.ranks import ALONE, Ranks
from ..common.run import autocast, seed_everything
from .config import PairingConfig
from .objectives import OBJECTIVES, ObjectiveConfig, StudentMap, build_objective
from .optimiser import Schedule, build_average, build_optimiser, clip_gradients, may_fuse
from .start import begin
from .student_with_head import StudentWithHead
from .students import build_student, map_shape
from .targets.joined import AnyTarget
from .targets.space import TargetSpace
from .train_config import TrainConfig


def _parallel(model: nn.Module) -> DistributedDataParallel:
    """Without broadcasts of rank 0's buffers: queues and centres are the same on all ranks, and only rank 0 saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch from 2.12 on, whose new option older ones do not know
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def check_replay(config: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    """MisuseError: something other than the next step may ask for what a graph's replay overwrites."""
    unsafe = {
        f"`device` {device} has none": device.type != "cuda",
        f"there are {ranks.world_size} ranks, which exchange gradients meanwhile": ranks.world_size > 1,
        "`accumulate` runs the student several times a step": (config.accumulate or 1) > 1,
        "`knn_every` runs the student between steps": config.knn_every is not None,
    }
    for reason, found in unsafe.items():
        if found:
            raise MisuseError(f"`compile` reduce-overhead replays CUDA graphs, and {reason}: use `compile` default")


class Trainer:
    """The student, its optimiser and schedule: everything that one step changes.

    ``fresh``: the student begins with what ``config.student.init`` names, and ``began`` says so; a run that goes on has it in
    its checkpoint. ``moved`` tells whether the last step moved the student: fp16 skips one whose gradient overflowed.
    ``compiles``: whether the first step does, which one rank of a machine then rehearses.
    """

    def __init__(
        self,
        config: TrainConfig,
        space: TargetSpace,
        steps_per_epoch: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        num_images: int | None = None,
        fresh: bool = True,
    ) -> None:
        seed_everything(config.seed)
        assert config.objective and isinstance(config.pairing, PairingConfig) and config.epochs, "the plan chooses them"
        backbone = build_student(config.student)
        self.began = begin(backbone, config.student) if fresh and config.student.init else ""
        features: int = backbone.num_features  # type: ignore[assignment]
        student_map = (
            student_map_of(config, backbone, space.of_student) if reads_patches(config.objective, space) else None
        )
        self.objective = build_objective(
            config.objective,
            features,
            space,
            config.pairing.step_targets,
            num_images,
            student_map,
            config.pairing.num_global,
        )
        self.model = StudentWithHead(backbone, self.objective, config.accumulate or 1).to(device).train()
        if self.objective.joined_norm if config.sync_batchnorm is None else config.sync_batchnorm:
            join_batchnorms(self.model)
        compiled = config.compile or stored_settings(device).compile_mode
        if self.objective.patch_weight:  # its maps are asked for past the call, which is what is compiled
            if config.compile not in (None, "off"):
                raise MisuseError(
                    f"`compile` {config.compile} does nothing for `objective` {config.objective.name}, which reads the student's "
                    "patches: leave it out, or give `patch_weight` 0"
                )
            compiled = "off"
        self.replays = compiled == "reduce-overhead"
        if self.replays:
            check_replay(config, device, ranks)
        if compiled != "off":
            self.model.compile_backbone(replayed=self.replays)
        self.compiles = compiled != "off" or device.type == "cuda"
        self.parallel = self.model if ranks.world_size == 1 else _parallel(self.model)
        fused = may_fuse(self.model, config.precision)
        self.optimiser = build_optimiser(self.model, config.optimiser, config.loader.batch_size, fused)
        self.parameters = list(self.model.parameters())  # walking through the modules takes a third of a ms, every step
        self.schedule = Schedule(self.optimiser, config.optimiser, steps_per_epoch, config.epochs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = build_average(self.model.backbone, config.average) if config.average else None
        if config.freeze_prototypes and not self.objective.prototype_weights:
            raise MisuseError(f"`freeze_prototypes`: `objective` {config.objective.name} has none, leave it out")
        self.steps_with_still_prototypes = (config.freeze_prototypes or 0) * steps_per_epoch
        self.clip_grad, self.clip_each = config.clip_grad or float("inf"), bool(config.clip_each)
        self.precision, self.device, self.moved = config.precision, device, True
        # The scaler decides on the host whether to call the optimiser: asking for its scale would wait for the GPU again.
        # A weak reference: in a cycle the process group's last user would outlive the run, to the end of the interpreter.
        trainer = weakref.proxy(self)
        self.optimiser.register_step_post_hook(lambda *_: setattr(trainer, "moved", True))

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, by name."""
        parts = {"model": self.model, "optimiser": self.optimiser, "scaler": self.scaler}
        return parts | ({"average": self.average.module} if self.average else {})

    def rehearse(self, crops: list[Tensor], target: AnyTarget | None, pair_weights: Tensor) -> None:
        """Forward and backward once, which compiles what a step needs; nothing of the run changes."""
        before = deepcopy(self.model.state_dict())
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with autocast(self.device, self.precision):
                loss = self.model(crops, target, pair_weights)
            learns = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            # Not ``backward``: DDP would ask other ranks for theirs.
            torch.autograd.grad(loss, learns, allow_unused=True)
        self.model.load_state_dict(before)

    def step(
        self, number: int, crops: list[Tensor], target: AnyTarget | None, pair_weights: Tensor
    ) -> tuple[Tensor, float]:
        """Step ``number`` (from 0): (loss, gradient norm) as a (2,) tensor on the device, and the learning rate."""
        rate = self.schedule.step(number)
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs left is not needed any more
        with autocast(self.device, self.precision):
            loss = self.parallel(crops, target, pair_weights)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        if number < self.steps_with_still_prototypes:
            for parameter in self.objective.prototype_weights:  # before the norm: what does not move has no part in it
                parameter.grad = None
        norm = clip_gradients(self.parameters, self.clip_grad, self.clip_each)
        self.moved = False
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average and self.moved:
            self.average.update(self.model.backbone, number)
        if self.scaler.is_enabled():  # fp16 skips a step whose gradient overflowed: no reason to stop
            norm = torch.where(norm.isfinite(), norm, 0.0)
        return torch.stack([loss.detach(), norm]), rate


def reads_patches(objective: ObjectiveConfig, space: TargetSpace) -> bool:
    """Whether there are targets of patches, and a use for them."""
    return space.patches is not None and bool(OBJECTIVES[objective.name].patch_kinds_of(objective))


def student_map_of(config: TrainConfig, backbone: nn.Module, of_student: bool) -> StudentMap:
    """What the student of ``config`` says of its patches. ``of_student``: its copy makes the targets. MisuseError: it has no map,
    or drops patches of it."""
    assert config.objective is not None
    if config.student.patch_drop:
        raise MisuseError(
            f"`patch_drop` {config.student.patch_drop:g} leaves no whole map for the patches of `objective` "
            f"{config.objective.name}: leave it out"
        )
    pairing, name = config.pairing, config.objective.name
    assert isinstance(pairing, PairingConfig)
    regions = config.objective.patch_from_region and pairing.num_local
    if not (pairing.replays and pairing.num_global >= pairing.step_targets) and not regions:
        instead = "leave out `fresh`" if of_student else "use `pairing` same without fewer `step_globals`"
        raise MisuseError(
            f"`objective` {name} compares patches of the very view that the teacher saw, and the student is shown others: "
            f"{instead}, or `patch_weight` 0"
        )
    width, side = map_shape(backbone, config.student.image_size, config.objective.patch_layer, config.student.name)
    return StudentMap(width, side, has_tokens(backbone))
