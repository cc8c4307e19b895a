"""The formats: what each needs, how it is written, and how it is run in its own runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ...common.errors import MisuseError
from .graph import Graph, Runner, quiet, run_module
from .mobile_files import load_executorch, write_coreml, write_executorch
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

    def check_installed(self, name: str) -> None:
        """MisuseError: a package is missing."""
        missing = [module for module in self.needs if find_spec(module) is None]
        if missing:
            raise MisuseError(
                f"`to` {name} needs {', '.join(missing)}, not installed here: in rob's folder, pip install -c constraints.txt "
                f"-e '.[{self.extra}]'"
            )


def write_torch(graph: Graph, path: Path) -> None:
    torch.export.save(graph.program, path)


def load_torch(path: Path) -> Runner:
    with quiet():
        return run_module(torch.export.load(path).module())


FORMATS = {
    "onnx": Format(
        ".onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime", "onnxslim"), "export", write_onnx, load_onnx
    ),
    "torch": Format(".pt2", "torch", (), "", write_torch, load_torch),
    "executorch": Format(
        ".pte", "executorch", ("executorch",), "executorch", write_executorch, load_executorch, batch=1
    ),
    "coreml": Format(".mlpackage", "coremltools", ("coremltools",), "coreml", write_coreml, None, "float16", batch=1),
    "timm": Format("", "timm", (), "", write_timm, load_timm, only_input="normalised"),
}
