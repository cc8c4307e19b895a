"""A packed data set and a store of targets, to look at. Not to be changed."""

from pathlib import Path

import pytest

from rob.common.images.beton import Beton
from rob.common.store.reader import TargetStore
from rob.teacher_cache.config import TeacherConfig
from support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def data(folder: Path) -> Beton:
    return tiny.tiny_beton(folder)


@pytest.fixture(scope="module")
def store(folder: Path, data: Beton) -> TargetStore:
    teacher = tiny.tiny_teacher_checkpoint(folder, prototypes=40)
    return tiny.tiny_store(folder / "targets.zarr", data, teacher)


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(tmp_path_factory.mktemp("headless"))
