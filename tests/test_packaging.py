"""The wheel holds the packages and nothing else, and imports run one way."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = {"tests", "build", "dist", "runs"}
MAY_IMPORT = {
    "common": {"common"},
    "teacher_cache": {"common", "teacher_cache"},
    "student_train": {"common", "student_train"},
}
"""Package -> the packages of rob that its files may import."""
KERNELS_MAY_IMPORT = {"torch", "triton"} | sys.stdlib_module_names
LONG = 400
"""Lines. The aim is 350 a file; beyond this one, split it."""


def modules() -> set[str]:
    """Paths from the root, ``/``-separated, of all files that belong to the package."""
    paths = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    return {path.as_posix() for path in paths if path.parts[0] not in NOT_PACKAGED and path.parts[0][0] != "."}


def imported_names(path: str) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, at any depth, with their lines; rob's own begin with ``rob.``."""
    package = ["rob", *Path(path).parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in a wheel built from a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("build") / "tree", tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, tree, ignore=ignore)
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("rob-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_and_nothing_else(wheel_names):
    content = {name for name in wheel_names if ".dist-info/" not in name}
    assert content == {f"rob/{path}" for path in modules()}


def test_wheel_carries_licence_and_command(wheel_names):
    info = {name.partition(".dist-info/")[2] for name in wheel_names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt"} <= info


def test_every_folder_of_modules_is_a_listed_package():
    """Editable installs work without this; the wheel would lack the folder."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {Path(path).parent for path in modules()}
    assert listed == {".".join(("rob", *folder.parts)) for folder in folders}
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sorted(modules())
        if path.startswith(f"{package}/")
        for name, line in imported_names(path)
        if name.split(".")[0] == "rob" and name.split(".")[1] not in MAY_IMPORT[package]
    ]
    assert not wrong


def test_kernels_import_only_torch_and_triton():
    kernels = "student_train/kernels/"
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sorted(modules())
        if path.startswith(kernels)
        for name, line in imported_names(path)
        if name.split(".")[0] not in KERNELS_MAY_IMPORT and not name.startswith("rob.student_train.kernels")
    ]
    assert not wrong


def test_packages_use_relative_imports():
    """So that a file says by itself whether it reaches outside its package."""
    wrong = [
        f"{path}:{node.lineno}"
        for path in sorted(modules())
        if path.split("/")[0] in MAY_IMPORT
        for node in ast.walk(ast.parse((ROOT / path).read_text(), path))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "rob"
    ]
    assert not wrong


def test_no_file_is_too_long():
    lines = {path: (ROOT / path).read_text().count("\n") for path in modules()}
    assert {path: count for path, count in lines.items() if count > LONG} == {}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_texts_of_the_root_are_written(name):
    assert (ROOT / name).read_text().strip()
