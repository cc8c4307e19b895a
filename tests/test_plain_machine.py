"""Where rob is not installed, and ffcv and zarr are not either: what a plain GPU machine has is enough for the kernels, and all
runs without ffcv."""

import subprocess
import sys

from test_structure import ROOT

from support.tiny import tiny_images, tiny_teacher_checkpoint

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


COMMANDS = """
import sys
sys.modules["ffcv"] = None
from rob import cli
TEACHER = "--teacher test_efficientnet_gn --checkpoint {checkpoint} --view-size 32 --views 2"
for words in (
    "pack {images} {out}/data.beton --workers 1",
    "cache-teacher {out}/data.beton {out}/targets.zarr --workers 1 " + TEACHER,
    "verify {out}/targets.zarr {out}/data.beton " + TEACHER.partition(" --view-size")[0],
    "train-student {out}/data.beton --targets {out}/targets.zarr --out {out}/run --student test_resnet --image-size 32 "
    "--epochs 1 --batch-size 8 --workers 1",
    "eval knn {out}/run {out}/data.beton --k 2 --workers 1",
    "doctor",
):
    sys.argv = ["rob", *words.split()]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
assert not [name for name in sys.modules if name.partition(".")[0] == "ffcv" and sys.modules[name]]
"""


def test_every_stage_runs_without_ffcv(tmp_path):
    images, checkpoint = tiny_images(tmp_path / "images", 16), tiny_teacher_checkpoint(tmp_path).checkpoint
    code = COMMANDS
    for name, value in (("images", images), ("checkpoint", checkpoint), ("out", tmp_path)):
        code = code.replace("{" + name + "}", str(value))
    said = in_a_child(code)
    assert "the slower torch loader is used" in said and "Pillow in worker processes" in said
    assert (tmp_path / "run" / "student.safetensors").exists() and (tmp_path / "run" / "eval" / "knn.json").exists()
