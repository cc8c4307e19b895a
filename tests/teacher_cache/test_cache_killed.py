"""A killed ``cache_teacher`` loses nothing, and its memory does not grow with the data."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rob.common.images.beton import RAW, BetonWriter, StoredImage
from rob.common.store.encodings import Encoding
from rob.teacher_cache.cache import cache_teacher
from support import tiny

pytestmark = pytest.mark.usefixtures("small_chunks")


# ==== killed ====

CACHE_SLOWLY = """
import sys, time
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[4]))
from support import tiny
from rob.common.images.beton import Beton
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest
from rob.teacher_cache import asked, cache
from rob.teacher_cache.teachers import TeacherConfig
from test_cache_killed import KILLED
asked.StoreManifest = partial(StoreManifest, chunk_rows=8, shard_chunks=2)

def rows(done, total):
    print(done, flush=True)
    time.sleep(0.02)

data, checkpoint, out = map(Path, sys.argv[1:4])
config = tiny.tiny_cache_config(out, Beton(data), TeacherConfig(tiny.TEACHER, checkpoint), **KILLED[sys.argv[5]])
cache.cache_teacher(config, cache.CacheProgress(rows=rows))
"""

KILLED = {
    "embedding": {},
    "fitted": {"encoding": Encoding("topk", k=4), "prototypes": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_killed_at_any_moment_and_run_again_it_is_byte_for_byte_the_same(more_data, headless, tmp_path, case) -> None:
    whole = tiny.tiny_store(tmp_path / "whole.zarr", more_data, headless, **KILLED[case])
    out = tmp_path / "killed.zarr"
    script = [sys.executable, "-c", CACHE_SLOWLY, str(more_data.path), str(headless.checkpoint), str(out)]
    script += [str(torch.get_num_threads()), case]
    kill_at, delay = random.randrange(2, 20 if case == "embedding" else 45), random.uniform(0, 0.05)
    print(f"killed {delay} s after line {kill_at}")
    with subprocess.Popen(script, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as process:
        for _ in range(kill_at):
            assert process.stdout.readline()
        signal.sigtimedwait([], delay)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    cache_teacher(tiny.tiny_cache_config(out, more_data, headless, **KILLED[case]))
    assert tiny.contents(out) == tiny.contents(whole.path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".killed")]


# ==== memory ====

PEAK_OF_CACHING = """
import sys
from pathlib import Path
import torch
from torch import nn
from rob.common.store.encodings import Encoding
from rob.common.views.loader import LoaderConfig
from rob.common.views.recipes import get_recipe
from rob.teacher_cache import cache
from rob.teacher_cache.teachers import Teacher, TeacherConfig

torch.set_num_threads(1)
backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4096))
backbone.num_features = 4096
cache.load_teacher = lambda config: Teacher("wide", backbone)
data, out = map(Path, sys.argv[1:])
cache.cache_teacher(cache.CacheConfig(
    data, out, TeacherConfig("wide"), get_recipe("weak"), views=2, view_size=8, device="cpu",
    encoding=Encoding("embedding", "int8"), loader=LoaderConfig(batch_size=128, workers=1),
))
status = Path("/proc/self/status").read_text()  # ru_maxrss would start from the parent's
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_does_not_grow_with_the_data(tmp_path) -> None:
    peaks = []
    for num_images in (2_000, 8_000):
        path = tmp_path / f"{num_images}.beton"
        pixels = np.random.default_rng(0).integers(0, 256, (num_images, 8 * 8 * 3), dtype=np.uint8)
        with BetonWriter(path, capacity=num_images) as writer:
            for image in pixels:
                writer.append(StoredImage(image.tobytes(), 8, 8, RAW), label=-1)
            names = tuple(f"{row}.png" for row in range(num_images))
            writer.finish(
                encoding="raw", jpeg_quality=None, max_resolution=None, paths=names, labels=None, classes=None
            )
        script = [sys.executable, "-c", PEAK_OF_CACHING, str(path), str(tmp_path / f"{num_images}.zarr")]
        peaks.append(int(subprocess.run(script, check=True, capture_output=True, text=True).stdout))
    small, large = peaks
    assert large < 1.1 * small, peaks  # all embeddings at once would be a fifth more; a shard of them is held in int8
