"""A small data set and teachers for ``cache_teacher``, shared by the files that test it."""

from functools import partial
from pathlib import Path

import pytest

from rob.common.images.beton import Beton
from rob.common.store.manifest import StoreManifest
from rob.teacher_cache import asked
from rob.teacher_cache.teachers import TeacherConfig
from support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(folder: Path) -> Beton:
    return tiny.tiny_beton(folder, 40)


@pytest.fixture(scope="module")
def more_data(folder: Path) -> Beton:
    return tiny.tiny_beton(folder, 200, seed=1)


@pytest.fixture(scope="module")
def headless(folder: Path) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(folder)


@pytest.fixture(scope="module")
def with_head(folder: Path) -> TeacherConfig:
    return tiny.tiny_teacher_checkpoint(folder, prototypes=30)


@pytest.fixture
def small_chunks(monkeypatch):
    """Five chunks of 8 images, in shards of 2."""
    monkeypatch.setattr(asked, "StoreManifest", partial(StoreManifest, chunk_rows=8, shard_chunks=2))
