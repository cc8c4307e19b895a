"""The kernels that ran in this process, as they were compiled: registers, spills, shared memory."""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rob.benchmarks.gpu_check.section import Section

MODULES = (
    "rob.student_train.kernels.triton_kernels",
    "rob.student_train.kernels.triton_passes",
    "rob.common.views.kernel",
    "rob.common.views.kernel_blur",
    "rob.common.views.kernel_colours",
)


def run(section: Section) -> None:
    if section.device.type != "cuda" or not find_spec("triton"):
        return
    for module in map(import_module, MODULES):
        for name, function in vars(module).items():
            if getattr(function, "__module__", None) == module.__name__ and hasattr(function, "device_caches"):
                section.rows += compiled(name, function)
    section.figures["spilled"] = sum(bool(row["spilled_bytes"]) for row in section.rows)


def compiled(name: str, function: Any) -> Iterator[dict[str, Any]]:
    """A row a variant of a Triton function that was launched."""
    for caches in function.device_caches.values():
        for kernel in caches[0].values():
            if getattr(kernel, "n_regs", None) is not None:
                yield {
                    "kernel": name,
                    "warps": kernel.metadata.num_warps,
                    "stages": kernel.metadata.num_stages,
                    "registers": kernel.n_regs,
                    "spilled_bytes": kernel.n_spills,
                    "shared_kib": kernel.metadata.shared / 1024,
                }
