"""The process that runs the sections, one after the other, and says what each found; ``check.py`` starts it, again where it
dies."""

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rob.benchmarks.gpu_check.section import NotHere, Section, brief
from rob.common.run import pick_device

BROKEN_DEVICE = 3
"""Exit code: the device answers no longer in this process, and the sections that are left need another."""


def main(asked: dict[str, Any]) -> None:
    """Run ``asked["sections"]``, (name, seconds) pairs; a JSON line to standard output when one begins, after each
    of its parts, and when it ends."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is for the log
    device = pick_device(asked["device"])
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def say(**line: Any) -> None:
        said.write(json.dumps(line) + "\n")

    spare = 0.0
    for name, seconds in asked["sections"]:
        seconds += spare
        say(begins=name, seconds=seconds)
        section = Section(name, device, Path(asked["data"]), seconds, asked["toy"], asked["quick"])
        section.said = lambda section: say(partly=section.name, **section.outcome())
        try:
            module = importlib.import_module(f"rob.benchmarks.gpu_check.{name}")
            section.started = time.perf_counter()  # the first import of a stage is slow, and measures nothing
            module.run(section)
            section.wait()
            ended = {}
        except NotHere as reason:
            ended = {"not_here": str(reason)}
        except Exception as error:
            ended = {"error": brief(error)}
        say(ends=name, **section.outcome(), **ended)
        spare = max(0.0, section.left())
        gc.collect()
        if device.type == "cuda":
            try:
                torch.cuda.empty_cache()
                torch.zeros(8, device=device).sum().item()
            except Exception:
                said.flush()
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                os._exit(BROKEN_DEVICE)  # whatever else would run at exit may wait for the device for ever


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
