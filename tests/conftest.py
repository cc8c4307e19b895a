"""What every test shares: no network, no example databases, and one small packed data set."""

import os
import re
import signal
from pathlib import Path

os.environ["PYTHONPATH"] = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))  # of scripts
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only get in each other's way
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a test that would download fails at once

import hypothesis
import pytest
from PIL import Image

from rob.common import timing
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.student_train import trial
from support.photographs import photograph

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them press.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same of nohup
# Shared machines stall for longer than a deadline; failures are printed as code to paste, so no database is needed.
# Each run draws examples of its own: over the runs there are many more than in one.
hypothesis.settings.register_profile("rob", max_examples=40, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("rob")
trial.MOST_STEPS = 3  # of a plan: nobody here goes by the time of a step
timing.MIN_CALLS, timing.MIN_SECONDS = 1, 0.0  # nor by a latency


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from tests that would take it because it is there: they assert what a CPU does, to the last digit. ``-m gpu``
    shows it, and so does ``-m 'gpu or not gpu'``."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("-m")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEG photographs of several sizes in three classes. Not to be changed."""
    folder = tmp_path_factory.mktemp("images")
    for row in range(24):
        path = folder / ("cat", "dog", "emu")[row // 8] / f"{row:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photograph(row, 40 + row, 64 - row)).save(path, quality=92)
    return folder


@pytest.fixture(scope="session")
def small_beton(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """``image_folder``, packed. Not to be changed."""
    out = tmp_path_factory.mktemp("packed") / "small.beton"
    pack(PackConfig(source=str(image_folder), out=out, shuffle=False))
    return Beton(out)
