"""Where rob is not installed, and ffcv and zarr are not either: what a plain GPU machine has is enough for the kernels."""

import subprocess
import sys

from test_structure import ROOT

UNINSTALLED = """
import importlib.metadata
import sys

found = importlib.metadata.version
def version(name):
    if name == "rob":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
"""
WITHOUT = """
import sys
for package in ("ffcv", "zarr", "numcodecs"):
    sys.modules[package] = None  # importing it raises ImportError
"""


def in_a_child(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_rob_imports_where_it_is_not_installed():
    code = "import rob; from rob.student_train import checkpoint; print(rob.__version__)"
    assert in_a_child(UNINSTALLED + code) == "unknown"


def test_the_view_kernel_and_the_losses_import_without_ffcv_and_zarr():
    code = (
        "from rob.common.views import kernel, reference, loader; from rob.student_train.kernels import triton_ce; "
        "print(loader.ffcv_backend)"
    )
    assert in_a_child(WITHOUT + code) == "None"
