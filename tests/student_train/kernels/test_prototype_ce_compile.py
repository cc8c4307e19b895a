"""The Triton kernels compiled ahead of time, without a GPU, for every kind of one: within shared memory and without spills.

The tests compile a few. All of them, as the table in benchmarks/loss_notes.md: python tests/.../test_prototype_ce_compile.py [90]
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is a Linux package")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import driver  # noqa: E402

from rob.student_train.kernels import triton_kernels, triton_passes  # noqa: E402

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory a block, by architecture: A100, RTX 30, RTX 40 and L4, H100 and H200, B200, RTX 50."""
OPERANDS = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = {
    "offset",
    "anchors",
    "sums",
    "log_sums",
    "bounds",
    "longest",
    "largest",
    "partial",
    "means",
    "target_means",
    "weights",
    "grad",
    "meets",
    "row_weights",
    "mixed_rows",
    "losses",
}  # to float32 whatever the operands
SCALARS = {"scale": "fp32", "safe": "fp32", "inverse_temp": "fp32", "views": "i32", "targets": "i32"}


class Variant(NamedTuple):
    """What is compiled: a kernel, its constants and how it is launched."""

    kernel: str
    dtype: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def variants(architecture: int) -> Iterator[Variant]:
    """All that a GPU may be asked for."""
    configs = triton_kernels.fitting_configs(SHARED[architecture], architecture // 10)
    for dtype, itemsize in OPERANDS.items():
        lift = 12 if dtype == "fp16" else 0
        block_d = triton_kernels.BLOCK_BYTES // itemsize
        scored = dict(OFFSET=True, PRECISION="tf32", BLOCK_D=block_d)
        for config in configs:
            constants = dict(scored, LIFT=lift, SUM_BLOCK=triton_kernels.SUM_BLOCK, **config.kwargs)
            yield Variant("_exponentials", dtype, constants, config.num_warps, config.num_stages)
        yield Variant("_log_sum_exp", dtype, dict(scored, **triton_kernels.ROW_TILES), 8, triton_kernels.ROW_STAGES)
        yield Variant("_softmax_rows", dtype, dict(OFFSET=True, LIFT=lift, BLOCK=triton_kernels.PASS_BLOCK), 8, 3)
        passes = triton_passes
        tile = dict(ROWS=passes.ROWS, WIDTH=passes.WIDTH)
        yield Variant("_row_bounds", dtype, dict(CAST=itemsize == 2, BOUND=True, OFFSET=True, **tile), 4, 3)
        blocks = dict(BLOCK_V=16, BLOCK_D=passes.COMBINED // 16)
        yield Variant("_combine", dtype, dict(LN_2=0.69, DENSE=True, **blocks), passes.COMBINED_WARPS, 3)
    yield Variant("_anchors", "fp32", dict(LINE=triton_passes.LINE), 4, 3)
    tile = dict(ROWS=triton_passes.SUMMED_ROWS, SLOTS=triton_passes.SUMMED_SLOTS)
    yield Variant("_row_sums", "fp32", dict(LIFT=0, **tile), 4, 3)


def compiled(variant: Variant, architecture: int) -> tuple[int, int, int]:
    """Bytes of shared memory, bytes spilled, registers a thread."""
    function = getattr(triton_kernels, variant.kernel, None) or getattr(triton_passes, variant.kernel)
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
        elif name in SCALARS or name.startswith("num_") or name.endswith(("split", "bucket", "stride", "width")):
            signature[name] = SCALARS.get(name, "i32")
        else:
            wide = name in POINTERS or (variant.kernel, name) in (("_softmax_rows", "logits"), ("_row_bounds", "rows"))
            wide = wide or (variant.kernel, name) == ("_anchors", "out")
            signature[name] = "*fp32" if wide else f"*{variant.dtype}"
        if signature[name].startswith("*") or name in ("width", "stride", "logits_stride"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in variant.constants.items()}
    kernel = triton.compile(
        ASTSource(function, signature, values, divisible),
        target=GPUTarget("cuda", architecture, 32),
        options=dict(num_warps=variant.num_warps, num_stages=variant.num_stages),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        gpu = f"sm_{architecture}" + "a" * (architecture >= 90)
        command = [ptxas(architecture), "-v", f"--gpu-name={gpu}", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled, registers = (re.findall(p, said)[0] for p in (r"(\d+) bytes spill stores", r"Used (\d+) registers"))
    return kernel.metadata.shared, int(spilled), int(registers)


def ptxas(architecture: int) -> str:
    """Triton's own, of which it has a second for Blackwell."""
    tools = knobs.nvidia
    return tools.ptxas_blackwell.path if architecture >= 100 and hasattr(tools, "ptxas_blackwell") else tools.ptxas.path


def check(variant: Variant, architecture: int) -> str:
    shared, spilled, registers = compiled(variant, architecture)
    assert shared <= SHARED[architecture], f"{shared} bytes of shared memory"
    assert spilled == 0, f"{spilled} bytes spilled"
    return f"{shared >> 10} KiB, {registers} registers"


@pytest.mark.slow
@pytest.mark.skipif(not Path(ptxas(80)).exists(), reason="no ptxas: triton ships one on Linux")
@pytest.mark.parametrize(
    ("kernel", "architecture"),
    [
        *itertools.product(
            ("_exponentials",), (80, 86, 90, 100, 120)
        ),  # its tiles go by the architecture; 89's are 86's
        *itertools.product(
            ("_combine", "_log_sum_exp", "_softmax_rows", "_row_bounds", "_anchors", "_row_sums"), (86, 90)
        ),
    ],
)
def test_largest_tiles_fit_without_spills(kernel, architecture):
    check(next(v for v in variants(architecture) if v.kernel == kernel), architecture)


@pytest.mark.parametrize("architecture", SHARED)
def test_every_gpu_has_tiles_to_choose_from_and_no_more_than_four(architecture):
    """Each is compiled and timed when a size is met for the first time."""
    assert 2 <= len(triton_kernels.fitting_configs(SHARED[architecture], architecture // 10)) <= 4


class NoGpu:
    """A driver of an H100 that is not there: enough to compile for it."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED[90]}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.slow
def test_a_first_call_compiles_all_tiles_and_another_size_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton_kernels, "_compiled", set())
    constants = dict(OFFSET=False, PRECISION="tf32", LIFT=0, BLOCK_D=64, SUM_BLOCK=128)
    monkeypatch.setattr(driver, "_active", NoGpu())
    for rows, prototypes, width in ((48, 1003, 256), (65, 1024, 384)):
        query, keys = (torch.zeros(n, width, dtype=torch.bfloat16) for n in (rows, prototypes))
        out, anchors, sums = keys.new_empty(rows, 1024), torch.zeros(rows), torch.zeros(2, 8, rows)
        sizes = rows, prototypes, 1024, 14.4, triton.next_power_of_2(rows), width
        triton_kernels._compiled.clear()
        triton_kernels.compile_together((query, keys, anchors, anchors, out, sums, *sizes), constants)
        assert len(triton_kernels._exponentials.device_caches[0][0]) == len(triton_kernels.CONFIGS)


if __name__ == "__main__":
    for architecture in map(int, sys.argv[1:] or SHARED):
        for variant in variants(architecture):
            try:
                said = check(variant, architecture)
            except (AssertionError, subprocess.CalledProcessError, RuntimeError) as error:
                said = f"FAILED: {type(error).__name__} {error}"[:200]
            tile = {n: v for n, v in variant.constants.items() if n.startswith("BLOCK")}
            print(architecture, variant.kernel, variant.dtype, tile, f"{variant.num_warps} warps", said, flush=True)
