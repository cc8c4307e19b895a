"""The photographs that both stages are measured on, packed while other sections run; and numba's code, compiled meanwhile."""

import sys
import time
from pathlib import Path

import numpy as np

from rob.benchmarks.gpu_check.section import NotHere, Section
from rob.benchmarks.photographs import make_photographs
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.views.drawing import LOCAL
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.common.views.recipes import get_recipe

DONE, FAILED = "done", "failed"
FEW, MANY, COPIES = "photographs.beton", "often.beton", 4
"""The photographs, and each of them ``COPIES`` times: for a network that is through with them in a moment."""
LONGEST_WAIT = 120
"""Seconds that a section waits for the photographs."""


def make(folder: Path, count: int) -> None:
    """Pack ``count`` photographs into ``folder`` and load a batch of their views once. What fails is left in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        make_photographs(folder / "photographs", count)
        pack(PackConfig(str(folder / "photographs"), folder / FEW))
        (folder / "often").mkdir()
        for copy in range(COPIES):
            for photograph in (folder / "photographs").iterdir():
                (folder / "often" / f"{copy}-{photograph.name}").symlink_to(photograph)
        pack(PackConfig(str(folder / "often"), folder / MANY))
        sets = (ViewSet((0, 1), 32), ViewSet((LOCAL,), 16))
        for recipe in ("dino", "rob-dino"):
            loader = ViewLoader(Beton(folder / FEW), get_recipe(recipe), 0, LoaderConfig(batch_size=8))
            for batch in loader.epoch(np.arange(8), sets):
                batch.augment(0, 1.0, *_plain())
    except Exception as error:
        (folder / FAILED).write_text(f"{type(error).__name__}: {error}")
        raise
    (folder / DONE).touch()


def _plain():
    import torch

    return torch.zeros(3), torch.ones(3)


def photographs(section: Section, packed: str = FEW) -> Beton:
    """The packed photographs (``FEW`` or ``MANY``), once they are there; the wait is not of the section's time. NotHere: they
    cannot be made on this machine."""
    waited_from = time.perf_counter()
    while not (section.data / DONE).exists():
        if (section.data / FAILED).exists():
            raise NotHere(f"no photographs: {(section.data / FAILED).read_text()}")
        if time.perf_counter() - waited_from > LONGEST_WAIT:
            raise NotHere("the photographs were not ready in time")
        time.sleep(0.2)
    section.started += time.perf_counter() - waited_from
    return Beton(section.data / packed)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
