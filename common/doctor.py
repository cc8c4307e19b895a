"""What is installed, which paths are fast here, and what brings what is missing."""

import platform
import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .cores import usable_cores
from .errors import first_line
from .shared_memory import PLACE

FOR = {
    "ffcv": "the fast loader: one decode an image, compiled, on threads",
    "export": "rob export --to onnx, --int8",
    "executorch": "rob export --to executorch",
    "coreml": "rob export --to coreml",
    "litert": "rob export --to litert (an environment of its own)",
    "parquet": "rob pack from .parquet and .arrow, rob embed to .parquet",
    "video": "rob pack from videos",
    "dicom": "rob pack from DICOM",
    "heic": "rob pack from HEIC",
    "report": "rob report",
    "buckets": "images, packed files and target stores at s3://, gs:// and az://, images at https://",
    "tensorboard": "--logger tensorboard",
    "wandb": "--logger wandb",
    "mlflow": "--logger mlflow",
    "docs": "make docs",
    "standin": "--teacher efficientnet_lite0, without a network",
    "dev": "make test",
}
"""Extra -> what it is for."""


@dataclass(frozen=True)
class Extra:
    """``missing``: packages that are not there, or too old, as they should be."""

    name: str
    purpose: str
    missing: tuple[str, ...]


def installed(name: str) -> str | None:
    """A package's version; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def extras() -> list[Extra]:
    """rob's own requirements, under the name "", and its extras, as the installed package states them; nothing where rob is not
    installed."""
    found: dict[str, list[str]] = {"": []}
    for requirement in map(Requirement, _stated()):
        for extra in (*FOR, ""):
            marker = requirement.marker
            of_all = marker is None or marker.evaluate({"extra": ""})
            if of_all if extra == "" else not of_all and marker.evaluate({"extra": extra}):  # type: ignore[union-attr]
                found.setdefault(extra, [])
                if not _is_met(requirement):
                    found[extra].append(f"{requirement.name}{requirement.specifier}")
    return [Extra(name, FOR.get(name, "all of rob"), tuple(missing)) for name, missing in found.items()]


def _stated() -> list[str]:
    try:
        return requires("rob") or []
    except PackageNotFoundError:
        return []


def _is_met(requirement: Requirement) -> bool:
    there = installed(canonicalize_name(requirement.name))
    return there is not None and requirement.specifier.contains(there, prereleases=True)


def machine() -> list[tuple[str, str]]:
    """What it runs on."""
    import torch

    rows = [("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]
    rows += [("cores", f"{usable_cores()}")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        rows += [("GPU", f"{', '.join(names)}; CUDA {torch.version.cuda}")]
    elif torch.backends.mps.is_available():
        rows += [("GPU", "Apple's (--device mps)")]
    else:
        rows += [("GPU", "none that torch sees (on a machine with one: nvidia-smi)")]
    if PLACE.is_dir():
        rows += [("shared memory", f"{shutil.disk_usage(PLACE).free / 1e9:.1f} GB free in {PLACE}")]
    return rows


def paths() -> list[tuple[str, str]]:
    """Which of several ways is taken here, and what would bring a faster one."""
    import torch

    from .device_settings import settings_path, stored_settings
    from .run import choose_precision, has_bfloat16

    rows, on_gpu = [("images to views", _loader())], torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", torch.cuda.current_device())
        settings = stored_settings(device)
        kept = settings != type(settings)()
        fused = (
            "fused Triton kernels"
            if find_spec("triton")
            else "in tiles of torch: Triton is missing (pip install triton)"
        )
        rows += [("loss over prototypes", fused)]
        half = choose_precision(device, "auto") == "bf16"
        rows += [("precision", "bf16" if half else "fp32: bfloat16 is fast from compute capability 8 on")]
        known = f"known, {settings_path()}" if kept else "not measured: rob gpu-check times them once, in minutes"
        rows += [("fastest kernels of this GPU", known)]
        if find_spec("triton") and not any(map(shutil.which, ("gcc", "cc", "clang"))):
            rows += [("a C compiler", "none, and Triton wants one: apt-get install gcc")]
    else:
        half = has_bfloat16(torch.device("cpu"))
        rows += [("loss over prototypes", "in tiles of torch, as on every CPU")]
        rows += [
            ("precision", "fp32, or bf16 where a plan finds it faster" if half else "fp32: no bfloat16 arithmetic")
        ]
    return rows


def _loader() -> str:
    try:
        import_module(".views.ffcv_import", __package__)
    except ImportError as error:
        if installed("ffcv") is None:
            return "Pillow in worker processes, slower: ffcv is not installed"
        return f"Pillow in worker processes, slower: ffcv is installed and cannot be loaded ({first_line(error)})"
    return "ffcv, compiled: the fast one"
