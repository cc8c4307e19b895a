"""The Triton kernels compiled ahead of time for A100 and H100, without a GPU: within shared memory and without spills.

The tests compile the largest tiles. All of them, for every dtype and width: python tests/test_prototype_ce_compile.py
"""

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is a Linux package")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rob.student_train.kernels import triton_kernels  # noqa: E402

ARCHITECTURES = {8: 80, 9: 90}
FLAGS = {
    "attend": [dict(SHARED=True), dict(), dict(DENSE=True)],
    "prototype_gradient": [dict(TARGETS=False), dict(), dict(DENSE=True)],
}
FLOATS = {"centre", "means", "log_sums", "student_log_sums", "student_weights", "target_log_sums", "target_weights"}
SCALARS = {"scale": "fp32", "student_scale": "fp32", "target_scale": "fp32"}


def ptxas() -> str:
    return knobs.nvidia.ptxas.path


def compiled(kernel: str, config, major: int, dtype: str, width: int, flags: dict):
    """Compile one config; returns (bytes of shared memory, bytes spilled, registers a thread)."""
    function = getattr(triton_kernels, kernel).fn
    constants = {name: flags.get(name, name == "TARGETS") for name in ("DENSE", "SHARED", "TARGETS")}
    constants |= {name: width for name in ("D", "DT", "DQ", "DV", "WIDTH", "WIDTH_T", "WIDTH_Q", "WIDTH_V")}
    constants |= dict(CENTRED=True, PRECISION="tf32", LIFT=12 if dtype == "fp16" else 0)
    constants |= dict(TARGET_STAGES=triton_kernels.TARGET_STAGES) | config.kwargs
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS or name.startswith("num_") or name.endswith(("split", "bucket")):
            signature[name] = SCALARS.get(name, "i32")
        else:
            signature[name] = "*fp32" if name in FLOATS | {"gradient", "upstream"} else f"*{dtype}"
        if signature[name].startswith("*") or name in ("num_prototypes", "split"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): v for name, v in constants.items() if name in function.arg_names}
    kernel_ = triton.compile(
        ASTSource(function, signature, values, divisible),
        target=GPUTarget("cuda", ARCHITECTURES[major], 32),
        options=dict(num_warps=config.num_warps, num_stages=config.num_stages),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel_.asm["ptx"])
        gpu = "sm_90a" if major == 9 else "sm_80"
        command = [ptxas(), "-v", f"--gpu-name={gpu}", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (spilled,), (registers,) = (re.findall(p, said) for p in (r"(\d+) bytes spill stores", r"Used (\d+) registers"))
    return kernel_.metadata.shared, int(spilled), int(registers)


def fitting(kernel: str, major: int, dtype: str, width: int, flags: dict):
    one_stream, dense = bool(flags.get("SHARED") or flags.get("TARGETS") is False), flags.get("DENSE", False)
    return triton_kernels.fitting_configs(kernel, width, 4 if dtype == "fp32" else 2, major, one_stream, dense)


def check(kernel: str, config, major: int, dtype: str, width: int, flags: dict) -> str:
    shared, spilled, registers = compiled(kernel, config, major, dtype, width, flags)
    assert shared <= triton_kernels.SHARED_MEMORY[major], f"{shared} bytes of shared memory"
    assert spilled == 0, f"{spilled} bytes spilled"
    return f"{shared >> 10:4} KiB shared, {registers} registers"


@pytest.mark.slow
@pytest.mark.skipif(not Path(ptxas()).exists(), reason="no ptxas: triton ships one on Linux")
@pytest.mark.parametrize("major", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "flags"), [("attend", dict(SHARED=True)), ("prototype_gradient", {})])
def test_largest_tiles_fit_without_spills(kernel, flags, major):
    check(kernel, fitting(kernel, major, "bf16", 256, flags)[0], major, "bf16", 256, flags)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("width", [16, 64, 256])
def test_some_config_fits_every_width(width, major, itemsize):
    for kernel, one_stream, dense in product(FLAGS, (False, True), (False, True)):
        assert triton_kernels.fitting_configs(kernel, width, itemsize, major, one_stream, dense)


if __name__ == "__main__":
    for major in ARCHITECTURES:
        for dtype in ("bf16", "fp16", "fp32"):
            for width in (64, 128, 256):
                for kernel, choices in FLAGS.items():
                    for flags in choices:
                        for config in fitting(kernel, major, dtype, width, flags):
                            try:
                                said = check(kernel, config, major, dtype, width, flags)
                            except AssertionError as error:
                                said = f"FAILED: {error}"
                            print(ARCHITECTURES[major], dtype, width, kernel, flags, config, said, flush=True)
