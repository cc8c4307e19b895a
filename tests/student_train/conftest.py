"""A tiny data set, a teacher of it, its targets, and a run on them."""

import pytest

from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.student_train.train_config import TrainConfig
from rob.teacher_cache.teachers import TeacherConfig
from support.tiny import tiny_beton, tiny_store, tiny_teacher_checkpoint
from support.training import LOADER, small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Beton:
    """24 images: three batches."""
    return tiny_beton(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> TeacherConfig:
    """With a head of 24 dimensions and 10 prototypes."""
    return tiny_teacher_checkpoint(tmp_path_factory.mktemp("teacher"), prototypes=10)


@pytest.fixture(scope="module")
def store(data, teacher, tmp_path_factory) -> TargetStore:
    """Two views an image, embeddings in single precision. Not to be changed."""
    path = tmp_path_factory.mktemp("store") / "targets.zarr"
    return tiny_store(path, data, teacher, encoding=Encoding("embedding", "float32"), loader=LOADER)


@pytest.fixture
def config(data, store, tmp_path) -> TrainConfig:
    """Four epochs of three steps, one target view a step, a line a step."""
    return small_run(data.path, store, tmp_path / "run")
