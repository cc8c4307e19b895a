"""Imports run one way: between the packages, and among all files, where none leads back to where it began."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = {"tests", "build", "dist", "docs", "runs", "venv"}
MAY_IMPORT = {
    "common": {"common"},
    "teacher_cache": {"common", "teacher_cache"},
    "student_train": {"common", "student_train"},
}
"""Package -> the packages of rob that its files may import."""
KERNELS_MAY_IMPORT = {"torch", "triton"} | sys.stdlib_module_names
LONG = 400
"""Lines. The aim is 350 a file; beyond this one, split it."""


def modules() -> list[str]:
    """Paths from the root, ``/``-separated, of all files that belong to the package."""
    paths = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    return sorted(path.as_posix() for path in paths if path.parts[0] not in NOT_PACKAGED and path.parts[0][0] != ".")


def imported_names(path: str) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, with their lines: at any depth, for type checkers too. rob's own begin with
    ``rob.``."""
    package = ["rob", *Path(path).parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """Each file and those of rob that it imports. The root's ``__init__`` only passes names on when they are asked for, and a
    name imported from it comes from the file that defines it.
    """
    files = {dotted(path): path for path in modules()}
    found: dict[str, set[str]] = {}
    for path in modules():
        found[path] = set()
        for name, _ in imported_names(path):
            while name not in files and "." in name:
                name = name.rpartition(".")[0]  # a function or class of a file
            if name in files and name != "rob":
                found[path].add(files[name])
    return found


def dotted(path: str) -> str:
    """``common/views/loader.py`` -> ``rob.common.views.loader``, ``common/__init__.py`` -> ``rob.common``."""
    return ".".join(("rob", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def test_no_import_leads_back_to_where_it_began():
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    wrong = [
        f"{path}:{line} imports {name}"
        for path in modules()
        if path.startswith(f"{package}/")
        for name, line in imported_names(path)
        if name.split(".")[0] == "rob" and name.split(".")[1] not in MAY_IMPORT[package]
    ]
    assert not wrong


def test_kernels_import_only_torch_and_triton():
    wrong = [
        f"{path}:{line} imports {name}"
        for path in modules()
        if path.startswith("student_train/kernels/")
        for name, line in imported_names(path)
        if name.split(".")[0] not in KERNELS_MAY_IMPORT and not name.startswith("rob.student_train.kernels")
    ]
    assert not wrong


def test_packages_use_relative_imports():
    """So that a file says by itself whether it reaches outside its package."""
    wrong = [
        f"{path}:{node.lineno}"
        for path in modules()
        if path.split("/")[0] in MAY_IMPORT
        for node in ast.walk(ast.parse((ROOT / path).read_text(), path))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "rob"
    ]
    assert not wrong


def test_no_file_is_too_long():
    lines = {path: (ROOT / path).read_text().count("\n") for path in modules()}
    assert {path: count for path, count in lines.items() if count > LONG} == {}
