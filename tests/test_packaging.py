"""The wheel holds the packages, the demo's teacher, and nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from test_structure import ROOT, modules


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in a wheel built from a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("build") / "tree", tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "venv")
    shutil.copytree(ROOT, tree, ignore=ignore)
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("rob-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_the_demos_teacher_and_nothing_else(wheel_names):
    content = {name for name in wheel_names if ".dist-info/" not in name}
    assert content == {f"rob/{path}" for path in [*modules(), "assets/teacher_fashion_mnist.safetensors"]}


def test_wheel_carries_licence_and_command(wheel_names):
    info = {name.partition(".dist-info/")[2] for name in wheel_names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt"} <= info


def test_every_folder_of_modules_is_a_listed_package():
    """Editable installs work without this; the wheel would lack the folder."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {Path(path).parent for path in modules()}
    assert listed == {".".join(("rob", *folder.parts)) for folder in folders}
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_texts_of_the_root_are_written(name):
    assert (ROOT / name).read_text().strip()
