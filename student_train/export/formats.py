"""The formats: what each needs, how it is written, and how it is run in its own runtime."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ...common.errors import BRINGS, MisuseError
from .coreml_file import write_coreml, write_coreml_int8
from .executorch_file import load_executorch, write_executorch, write_executorch_int8
from .graph import Graph, Runner, quiet, run_module
from .int8 import quantise
from .litert_file import load_litert, write_litert, write_litert_int8
from .onnx_file import load_onnx, write_onnx
from .timm_folder import load_timm, write_timm


@dataclass(frozen=True)
class Format:
    """``needs`` are the modules that ``extra`` installs; ``load`` is None where the file cannot be run on this system."""

    suffix: str
    runtime: str
    needs: tuple[str, ...]
    extra: str
    write: Callable[[Graph, Path], None]
    load: Callable[[Path], Runner] | None
    precision: str = "float32"
    only_input: str | None = None
    """The one input form that it has."""
    batch: int | None = None
    """Images that it takes at a time; None: any number."""
    write_int8: Callable[[Graph, Path, Path, Sequence[np.ndarray], str], float] | None = None
    """Graph, the float file, the file to write, batches of images to calibrate on, and how: the share of weights of 8 bits."""
    alone: bool = False
    """Whether it installs in an environment of its own only."""

    def check_installed(self, name: str) -> None:
        """MisuseError: a package is missing."""
        missing = [module for module in self.needs if find_spec(module) is None]
        if missing:
            alone = f"in rob's folder, and in an environment of its own, pip install -e '.[{self.extra}]'"
            brings = alone if self.alone else BRINGS.format(self.extra)
            raise MisuseError(f"`to` {name} needs {', '.join(missing)}, not installed here: {brings}")


def write_torch(graph: Graph, path: Path) -> None:
    torch.export.save(graph.program, path)


def load_torch(path: Path) -> Runner:
    with quiet():
        return run_module(torch.export.load(path).module())


FORMATS = {
    "onnx": Format(
        ".onnx",
        "onnxruntime",
        ("onnx", "onnxscript", "onnxruntime", "onnxslim"),
        "export",
        write_onnx,
        load_onnx,
        write_int8=quantise,
    ),
    "torch": Format(".pt2", "torch", (), "", write_torch, load_torch),
    "executorch": Format(
        ".pte",
        "executorch",
        ("executorch",),
        "executorch",
        write_executorch,
        load_executorch,
        batch=1,
        write_int8=write_executorch_int8,
    ),
    "coreml": Format(
        ".mlpackage",
        "coremltools",
        ("coremltools",),
        "coreml",
        write_coreml,
        None,
        "float16",
        batch=1,
        write_int8=write_coreml_int8,
    ),
    "litert": Format(
        ".tflite",
        "ai-edge-litert",
        ("litert_torch", "ai_edge_quantizer"),
        "litert",
        write_litert,
        load_litert,
        batch=1,
        write_int8=write_litert_int8,
        alone=True,
    ),
    "timm": Format("", "timm", (), "", write_timm, load_timm, only_input="normalised"),
}
