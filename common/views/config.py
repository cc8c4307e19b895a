"""What can be set of loading views."""

from dataclasses import dataclass
from typing import Annotated

from ..config import Workers
from ..cores import usable_cores
from ..settings import Setting, check

BACKENDS = ("auto", "ffcv", "torch", "gpu")


@dataclass(frozen=True)
class LoaderConfig:
    """How views are loaded. With gpu the ``workers`` only decode: batches carry planes, of which ``Batch.augment`` makes views
    on the device.
    """

    backend: Annotated[
        str,
        Setting(
            "auto, ffcv, torch or gpu. torch is Pillow in a torch DataLoader: slower, runs where ffcv cannot be built. gpu "
            "leaves only decoding to the CPU (checked on an H200): with CUDA auto is gpu in caching and training, unless rob "
            "gpu-check found ffcv faster, and ffcv elsewhere. Use one and the same for caching and for training with --pairing "
            "same: their pixels differ by about 1/255.",
            choices=BACKENDS,
            option="--loader",
        ),
    ] = "auto"
    batch_size: Annotated[int, Setting("Images a forward pass. Lower it when memory runs out.", low=1)] = 64
    workers: Workers = 0

    def __post_init__(self) -> None:
        check(self)

    @property
    def on_gpu(self) -> bool:
        """Whether batches carry planes, for ``Batch.augment`` to make views of on the GPU."""
        return self.backend == "gpu"

    @property
    def threads(self) -> int:
        """``workers``, or as many as this process has cores."""
        return self.workers or usable_cores()
