"""One store by many workers, ranks that share it or jobs that make parts of it in any order, is that of one process."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import support.ranks  # noqa: F401 (what the workers are forked with)
from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.look.contents import inspect
from rob.common.places import Folder, place_of
from rob.common.store.begun import half_written
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from rob.teacher_cache import asked, cache
from rob.teacher_cache.cache import CacheProgress, cache_teacher
from rob.teacher_cache.share import Share, together
from rob.teacher_cache.teachers import TeacherConfig
from support import tiny

pytestmark = pytest.mark.usefixtures("small_chunks")
FORKED = multiprocessing.get_context("forkserver")
CASES = {
    "embedding": {"encoding": Encoding("embedding", "int8")},
    "fitted": {"encoding": Encoding("topk", k=4), "prototypes": 10},
}
PARTS = 7


def work(config: cache.CacheConfig, threads: int, rank: int, ranks: int, killed_at: int | None, told: Any) -> None:
    """A worker: it shares its store with others, and may be killed at the so-many-th look at what all have done."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(threads)
    asked.StoreManifest = partial(StoreManifest, chunk_rows=8, shard_chunks=2)
    looks = []

    def rows(done: int, total: int) -> None:
        looks.append(done)
        if len(looks) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        cache_teacher(config, CacheProgress(rows=rows))
    except MisuseError as error:
        told.put(str(error))


def start(config: cache.CacheConfig, rank: int = 0, ranks: int = 1, killed_at: int | None = None, told: Any = None):
    worker = FORKED.Process(target=work, args=(config, torch.get_num_threads(), rank, ranks, killed_at, told))
    worker.start()
    return worker


def ended(*workers) -> list[int]:
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_and_parts_make_the_store_of_one_process(more_data: Beton, headless: TeacherConfig, tmp_path, case):
    whole = tiny.contents(tiny.tiny_store(tmp_path / "whole.zarr", more_data, headless, **CASES[case]).path)
    for ranks in (2, 4):
        config = tiny.tiny_cache_config(tmp_path / f"{ranks}.zarr", more_data, headless, **CASES[case])
        assert ended(*(start(config, rank, ranks) for rank in range(ranks))) == [0] * ranks
        assert tiny.contents(config.out) == whole

    chance = random.Random()
    order, killed_at = chance.sample(range(1, PARTS + 1), PARTS), [chance.randint(1, 4) for _ in range(PARTS)]
    print(f"parts {order} killed at {killed_at}")
    parts = [
        tiny.tiny_cache_config(tmp_path / "parts.zarr", more_data, headless, part=f"{number}/{PARTS}", **CASES[case])
        for number in order
    ]
    killed = ended(*(start(part, killed_at=at) for part, at in zip(parts, killed_at, strict=True)))
    assert set(killed) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in killed
    for part in parts:
        cache_teacher(part)
    assert tiny.contents(tmp_path / "parts.zarr") == whole
    assert sorted(path.name for path in tmp_path.glob(".*zarr*")) == []


def stop(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_part_leaves_the_others_and_ranks_do_the_rest(data: Beton, headless: TeacherConfig, tmp_path, monkeypatch):
    whole = tiny.tiny_store(tmp_path / "whole.zarr", data, headless)
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", data, headless)
    notes = []
    cache_teacher(config(part="2/3"), CacheProgress(note=notes.append))
    assert notes[-1:] == [
        f"{tmp_path / 'a.zarr'}: this part is done; 2 of 3 shards are missing, and whoever makes the last of them finishes "
        "the store"
    ]
    assert dict(inspect(tmp_path / "a.zarr").rows)["whole shards"] == "1 of 0 to 2"
    plans = []
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config(part="3/3"), CacheProgress(plan=plans.append, rows=stop))
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(replace(config(), out=tmp_path / "b.zarr"), CacheProgress(plan=plans.append, rows=stop))
    assert [plan.rows_to_do for plan in plans] == [16, 16]  # of the worker that has most
    with pytest.raises(MisuseError, match="half-written, 16 of 40 rows are done"):
        TargetStore.open(tmp_path / "a.zarr")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = []
    cache_teacher(config(), CacheProgress(rows=lambda rows, total: done.append(rows)))
    assert (done[0], done[-1]) == (16, 40)  # of all workers
    assert tiny.contents(tmp_path / "a.zarr") == tiny.contents(whole.path)
    cache_teacher(config())  # a rank that comes late
    assert tiny.contents(tmp_path / "a.zarr") == tiny.contents(whole.path)

    def gone(*_: object) -> None:
        raise FileNotFoundError("pending/manifest.json")

    monkeypatch.setattr(asked, "begun_store", gone)  # and one that comes while pending/ is being removed
    monkeypatch.setattr(StoreWriter, "open_or_resume", gone)
    rank, manifest = Share.of(None), TargetStore.open(tmp_path / "a.zarr").manifest
    asked.refuse_what_is_in_the_way(tmp_path / "a.zarr", manifest, rank)
    assert rank.join(tmp_path / "a.zarr", manifest) is None


def test_parts_in_a_bucket(data: Beton, headless: TeacherConfig, tmp_path):
    """In another order, one of them killed in the middle and started again; the prototypes are fitted there, too."""
    pytest.importorskip("obstore")
    fitted = {"prototypes": 5, "encoding": Encoding("dense")}
    whole = tiny.contents(tiny.tiny_store(tmp_path / "whole.zarr", data, headless, **fitted).path)
    bucket = os.environ.get("ROB_TEST_BUCKET", "memory://parts")
    config = partial(tiny.tiny_cache_config, Path(f"{bucket}/a.zarr"), data, headless, **fitted)

    def killed(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    cache_teacher(config(part="3/3"))
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config(part="1/3"), CacheProgress(rows=killed))
    for part in ("2/3", "1/3"):
        cache_teacher(config(part=part))
    place = place_of(bucket)
    place.write("a.zarr/pending/manifest.json", b"")  # of a part that was killed while it dropped what is there
    cache_teacher(config(part="3/3"))
    assert {name: place.read(name) for name in place.names()} == {
        f"a.zarr/{name}": rows for name, rows in whole.items()
    }
    assert not Path(bucket.partition("/")[0]).exists()  # no folder of the address's name
    with pytest.raises(MisuseError, match=r"s3://b names a bucket: write s3://b/NAME"):
        asked.temporary_store(replace(config(), out=Path("s3://b")))


def test_workers_of_other_settings_or_another_split_are_refused(data: Beton, headless: TeacherConfig, tmp_path):
    config = partial(tiny.tiny_cache_config, tmp_path / "a.zarr", data, headless)
    cache_teacher(config(part="1/3"))
    with pytest.raises(MisuseError, match=r"was begun with other settings .*seed is 0 in the store, not 1"):
        cache_teacher(config(part="2/3", seed=1))
    held = Share.of("1/3").join(tmp_path / "a.zarr", half_written(Folder(tmp_path / "a.zarr")))
    for other, message in (
        (config(part="2/4"), "it is being written by a part of 3, and this is a part of 4: wait until they have ended"),
        (config(), "another rob cache-teacher is writing this store; wait for it to finish"),
    ):
        told = FORKED.SimpleQueue()
        assert ended(start(other, told=told)) == [0]
        assert message in told.get()
    del held
    cache_teacher(config(part="1/2"))  # when they have ended, any split may go on
    cache_teacher(config(part="2/2"))
    assert TargetStore.open(tmp_path / "a.zarr").verify() == []


def test_whoever_looks_whether_all_is_done_is_alone(tmp_path):
    """Else two who leave at the same time might both do what is left for the last."""
    entering = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_SH | fcntl.LOCK_NB)"
    found = []

    def done() -> bool:
        found.append(
            subprocess.run([sys.executable, "-c", entering, tmp_path / ".t.zarr.lock"], stderr=subprocess.DEVNULL)
        )
        return True

    with together(tmp_path / "t.zarr", done, lambda: None):
        pass
    assert [process.returncode for process in found] == [1]


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "3/0", "-1/4", "1/2/3", "a/b"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(MisuseError, match=rf"`part` '{part}' is none: give K/N"):
        Share.of(part)


def test_a_part_under_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MisuseError, match="the ranks of torchrun share without it"):
        Share.of("1/2")
