"""Weights & Biases, as its own variables and login have it: ``WANDB_MODE=offline`` keeps all of it in the run's folder until
``wandb sync``, ``WANDB_PROJECT`` is the project (else rob)."""

import os
from collections.abc import Mapping

from .logger import Logger, Opening


def open_logger(opening: Opening) -> Logger:
    return WandbLogger(opening)


class WandbLogger:
    """A run that goes on has the same id: on the server it is one run, and offline ``wandb sync`` makes it one."""

    def __init__(self, opening: Opening) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rob"),
            name=opening.out.resolve().name,
            id=opening.key,
            resume="allow",
            dir=str(opening.out),
            config=dict(opening.settings),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
