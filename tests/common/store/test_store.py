"""The target store: round trip, refusals, damage, and being killed at any moment."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from rob.common.errors import FailureError, MisuseError
from rob.common.store import writer as store_writer
from rob.common.store.codec import encode
from rob.common.store.encodings import Encoding
from rob.common.store.manifest import StoreManifest, differing
from rob.common.store.reader import TargetStore, add_prototypes
from rob.common.store.writer import StoreWriter

VIEWS, DIM, PROTOTYPES = 3, 16, 40
ENCODINGS = [
    Encoding("embedding", "float32"),
    Encoding("embedding", "int8"),
    Encoding("topk", k=8),
    Encoding("dense"),
]


def manifest_of(encoding: Encoding, num_images: int = 70, num_prototypes: int = PROTOTYPES, **changes) -> StoreManifest:
    """Chunks of 8 rows in shards of 3: 70 images are two whole shards and one with two whole chunks and a short one."""
    manifest = StoreManifest(
        data_fingerprint="ab12",
        num_images=num_images,
        recipe={"name": "dino", "global_scale": [0.14, 1.0]},
        seed=3,
        view_ids=tuple(range(VIEWS)),
        view_size=32,
        teacher="tiny",
        weights_hash="cd34",
        head="none",
        dim=DIM,
        num_prototypes=num_prototypes,
        teacher_temp=0.04,
        encoding=encoding.to_dict(),
        precision="fp32",
        geometry="ffcv",
        versions={"torch": "2"},
        chunk_rows=8,
        shard_chunks=3,
    )
    return replace(manifest, **changes)


def chunk_of(manifest: StoreManifest, start: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a teacher would give for the chunk at ``start``: any function of the rows' numbers."""
    return _encoded(Encoding.from_dict(manifest.encoding), start, min(start + manifest.chunk_rows, manifest.num_images))


@lru_cache
def _encoded(encoding: Encoding, start: int, stop: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    embedding = torch.randn(stop, VIEWS, DIM, generator=torch.Generator().manual_seed(7))[start:]
    embedding = torch.nn.functional.normalize(embedding, dim=-1)
    arrays = encode(encoding, embedding, embedding @ prototypes().T)
    return arrays, {"embedding_sum": embedding.double().sum((0, 1)).numpy(), "rows": np.array(stop - start)}


@lru_cache
def prototypes() -> torch.Tensor:
    return torch.randn(PROTOTYPES, DIM, generator=torch.Generator().manual_seed(99))


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Tests survive no power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(path: Path, manifest: StoreManifest, stop: int | None = None) -> StoreWriter:
    """Start or go on with a store, up to row ``stop`` or to the end."""
    writer = StoreWriter.open_or_resume(path, manifest)
    while writer.rows_done < (manifest.num_images if stop is None else stop):
        writer.append(*chunk_of(manifest, writer.rows_done))
    if stop is None:
        writer.finish(prototypes().numpy() if manifest.num_prototypes else None)
    return writer


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def expected_rows(manifest: StoreManifest) -> dict[str, np.ndarray]:
    chunks = [chunk_of(manifest, start)[0] for start in range(0, manifest.num_images, manifest.chunk_rows)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


# ---- round trip ----


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
@pytest.mark.parametrize("num_images", [70, 48, 5])
def test_what_is_appended_is_read(tmp_path, encoding, num_images):
    manifest = manifest_of(encoding, num_images)
    write(tmp_path / "t.zarr", manifest)
    store, expected = TargetStore.open(tmp_path / "t.zarr"), expected_rows(manifest)
    assert store.manifest == manifest
    assert store.verify() == []
    for start, stop in [(0, num_images), (0, 1), (num_images - 1, num_images), (3, min(30, num_images))]:
        for name, values in store.read(start, stop).items():
            np.testing.assert_array_equal(values, expected[name][start:stop])
    ids = np.random.default_rng(0).integers(0, num_images, 50)
    for name, values in store.rows(ids).items():
        np.testing.assert_array_equal(values, expected[name][ids])
    np.testing.assert_array_equal(store.prototypes, prototypes())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
def test_zarr_reads_and_checks_the_same_arrays(tmp_path, encoding):
    manifest = manifest_of(encoding)
    write(tmp_path / "t.zarr", manifest)
    group = zarr.open_group(tmp_path / "t.zarr", mode="r")
    assert dict(group.attrs) == manifest.to_json()
    for name, values in expected_rows(manifest).items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.chunks[0], array.shards[0]) == (8, 24)  # type: ignore[index]
        np.testing.assert_array_equal(array[:], values)


def test_statistics_are_summed_over_all_chunks(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    writer = write(tmp_path / "t.zarr", manifest, stop=40)  # one chunk journalled, four in a shard
    assert writer.statistics["rows"] == 40
    write(tmp_path / "t.zarr", manifest)
    statistics = TargetStore.open(tmp_path / "t.zarr").statistics
    assert statistics["rows"] == 70
    embedding = expected_rows(manifest)["embedding"].astype(np.float64)
    np.testing.assert_allclose(statistics["embedding_sum"], embedding.sum((0, 1)), atol=1e-12)


def test_prototypes_are_added_to_a_complete_store(tmp_path):
    path = tmp_path / "t.zarr"
    write(path, manifest_of(ENCODINGS[1], num_prototypes=0))
    assert TargetStore.open(path).prototypes is None
    add_prototypes(
        path, prototypes().numpy(), head="kmeans", teacher_temp=0.05, statistics={"usage": np.arange(PROTOTYPES)}
    )
    store = TargetStore.open(path)
    assert (store.manifest.num_prototypes, store.manifest.head) == (PROTOTYPES, "kmeans")
    np.testing.assert_array_equal(store.prototypes, prototypes())
    assert set(store.statistics) == {"embedding_sum", "rows", "usage"}
    assert store.verify() == []
    with pytest.raises(MisuseError, match="has prototypes already"):
        add_prototypes(path, prototypes().numpy(), head="kmeans", teacher_temp=0.05)


# ---- refusals ----


def test_opening_refuses_what_is_no_whole_store(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    with pytest.raises(MisuseError, match=r"no target store at .*missing\.zarr"):
        TargetStore.open(tmp_path / "missing.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MisuseError, match="not a target store"):
        TargetStore.open(tmp_path / "folder")
    zarr.create_group(tmp_path / "other.zarr", attributes={"some": "group"})
    with pytest.raises(MisuseError, match="not a target store"):
        TargetStore.open(tmp_path / "other.zarr")
    write(tmp_path / "half.zarr", manifest, stop=40)
    with pytest.raises(MisuseError, match="half-written, 40 of 70 rows are done: run rob cache-teacher again"):
        TargetStore.open(tmp_path / "half.zarr")
    write(tmp_path / "old.zarr", manifest)
    group = json.loads((tmp_path / "old.zarr" / "zarr.json").read_text())
    group["attributes"]["format_version"] = 99
    (tmp_path / "old.zarr" / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(MisuseError, match="format version 99, this rob reads version 1"):
        TargetStore.open(tmp_path / "old.zarr")


def test_check_names_what_differs(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    write(tmp_path / "t.zarr", manifest)
    store = TargetStore.open(tmp_path / "t.zarr")
    store.check(data_fingerprint="ab12", recipe={"name": "dino", "global_scale": (0.14, 1.0)}, teacher="tiny")
    with pytest.raises(MisuseError, match="another data set: data_fingerprint is 'ab12' in the store, not 'zz'"):
        store.check(data_fingerprint="zz")
    with pytest.raises(MisuseError, match=r"another recipe: recipe.global_scale is \[0.14, 1.0\] in the store"):
        store.check(recipe={"name": "dino", "global_scale": (0.25, 1.0)})
    with pytest.raises(MisuseError, match="another teacher"):
        store.check(teacher="vit_base")


def test_a_writer_refuses_what_it_would_overwrite(tmp_path):
    manifest = manifest_of(ENCODINGS[0])
    write(tmp_path / "t.zarr", manifest, stop=16)
    with pytest.raises(MisuseError, match=r"begun with other settings .*seed is 3 in the store, not 4"):
        StoreWriter.open_or_resume(tmp_path / "t.zarr", replace(manifest, seed=4))
    assert StoreWriter.open_or_resume(tmp_path / "t.zarr", replace(manifest, versions={"torch": "3"})).rows_done == 16
    write(tmp_path / "t.zarr", manifest)
    with pytest.raises(MisuseError, match="already there and complete"):
        StoreWriter.open_or_resume(tmp_path / "t.zarr", manifest)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(MisuseError, match="not a target store"):
        StoreWriter.open_or_resume(tmp_path / "thesis", manifest)


HOLD = """
import sys
from pathlib import Path
import test_store
writer = test_store.write(Path(sys.argv[1]), test_store.manifest_of(test_store.ENCODINGS[0]), stop=16)
print("written", flush=True)
sys.stdin.read()
"""


def test_one_process_writes_a_store_at_a_time(tmp_path):
    path, manifest = tmp_path / "t.zarr", manifest_of(ENCODINGS[0])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=Path(__file__).parent, **pipes) as other:
        assert other.stdout.readline()
        before = files(path)
        with pytest.raises(MisuseError, match="another rob cache-teacher is writing this store; wait for it"):
            write(path, manifest)
        assert files(path) == before
        other.kill()
    write(path, manifest)  # the dead let go
    assert TargetStore.open(path).verify() == []
    assert not (path / "pending").exists()


# ---- damage ----


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_chunk_is_named(tmp_path, damage):
    manifest = manifest_of(ENCODINGS[1])
    write(tmp_path / "t.zarr", manifest)
    store = TargetStore.open(tmp_path / "t.zarr")
    shard = tmp_path / "t.zarr" / "embedding" / "c" / "1" / "0" / "0"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[5] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-30])
    else:
        shard.unlink()
    store.read(0, 24)
    with pytest.raises(FailureError, match=r"chunk 3 of array 'embedding' \(images 24 to 31\) is damaged"):
        store.read(24, 25)
    assert len(store.verify()) == (1 if damage == "flip" else 3)


@pytest.mark.parametrize(
    "left", ["", '{"attributes": {"data_f', "[1]", "\udcff"], ids=["empty", "cut", "other", "binary"]
)
def test_a_cut_manifest_is_one_sentence(tmp_path, left):
    write(tmp_path / "t.zarr", manifest_of(ENCODINGS[0]))
    (tmp_path / "t.zarr" / "zarr.json").write_bytes(left.encode(errors="surrogateescape"))
    with pytest.raises(FailureError, match=r"t\.zarr is damaged, its zarr\.json is cut or no JSON: delete the store"):
        TargetStore.open(tmp_path / "t.zarr")
    write(tmp_path / "half.zarr", manifest_of(ENCODINGS[0]), stop=16)
    (tmp_path / "half.zarr" / "pending" / "manifest.json").write_bytes(left.encode(errors="surrogateescape"))
    with pytest.raises(FailureError, match=r"its pending/manifest\.json is cut or no JSON"):
        TargetStore.open(tmp_path / "half.zarr")


def test_what_a_store_lacks_is_named(tmp_path):
    path = tmp_path / "t.zarr"
    write(path, manifest_of(ENCODINGS[0]))
    shutil.rmtree(path / "statistics")
    with pytest.raises(FailureError, match=r"array 'statistics/embedding_sum' is missing: delete the store and run"):
        _ = TargetStore.open(path).statistics
    group = json.loads((path / "zarr.json").read_text())
    del group["attributes"]["view_size"]
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(FailureError, match="its manifest lacks view_size: delete the store"):
        TargetStore.open(path)


# ---- interruption ----


def test_every_stopping_place_gives_the_same_bytes(tmp_path):
    for number, encoding in enumerate(ENCODINGS):
        manifest = manifest_of(encoding)
        write(tmp_path / f"whole{number}", manifest)
        for stop in range(0, 70, 8):
            write(tmp_path / f"parts{number}-{stop}", manifest, stop)
            write(tmp_path / f"parts{number}-{stop}", manifest)
            assert files(tmp_path / f"parts{number}-{stop}") == files(tmp_path / f"whole{number}")


@pytest.mark.parametrize("crash", range(1, 40))
def test_a_crash_at_any_file_operation_is_recovered(tmp_path, monkeypatch, crash):
    """The run dies at its ``crash``-th rename or unlink, before or after it happened; the next one finishes the store."""
    manifest = manifest_of(ENCODINGS[1])
    write(tmp_path / "whole", manifest)
    left = crash

    def dying(operation):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0 and crash % 2:
                raise KeyboardInterrupt
            operation(*args, **kwargs)
            if left == 0:
                raise KeyboardInterrupt

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(store_writer.shutil, "rmtree", dying(store_writer.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "t.zarr", manifest)
    with contextlib.suppress(MisuseError):  # already complete: it died after its very last step
        write(tmp_path / "t.zarr", manifest)
    assert files(tmp_path / "t.zarr") == files(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_sigkill_at_random_moments(tmp_path):
    # In a process of its own, because only one without threads may fork; forks, because importing takes seconds.
    script = "import sys; from pathlib import Path; import test_store; test_store.kill_and_resume(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "t.zarr")], cwd=Path(__file__).parent, check=True)
    manifest = manifest_of(ENCODINGS[1], num_images=400)
    write(tmp_path / "whole", manifest)
    assert files(tmp_path / "t.zarr") == files(tmp_path / "whole")


def kill_and_resume(path: Path) -> None:
    """Writes a store with writers in turn, each killed after up to 150 ms of writing, until the seventh or the end."""
    rng, progress = random.Random(0), []
    while len(progress) < 7 and not (path / "zarr.json").exists():
        child = start_writing(path)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        progress.append(len(list(path.rglob("*"))))
    assert len(set(progress)) > 2, progress  # they did die at different places
    assert os.waitpid(start_writing(path), 0)[1] == 0


def start_writing(path: Path) -> int:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(MisuseError):  # complete already: a fast machine, or killed in the very last step
            slow_write(path)
        os._exit(0)
    return child


def slow_write(path: Path) -> None:
    manifest = manifest_of(ENCODINGS[1], num_images=400)
    writer = StoreWriter.open_or_resume(path, manifest)
    while writer.rows_done < manifest.num_images:
        writer.append(*chunk_of(manifest, writer.rows_done))
        time.sleep(0.005)
    writer.finish(prototypes().numpy())


# ---- disk full ----


@pytest.mark.parametrize("write_number", [2, 4, 5, 12])
def test_disk_full_is_a_failure_and_resumes(tmp_path, monkeypatch, write_number):
    manifest = manifest_of(ENCODINGS[1])
    write(tmp_path / "whole", manifest)
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls >= write_number:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FailureError, match=r"disk of .* is full: about .* MB more are needed, .* MB are free"):
            write(tmp_path / "t.zarr", manifest)
    write(tmp_path / "t.zarr", manifest)
    assert files(tmp_path / "t.zarr") == files(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        manifest = manifest_of(Encoding("embedding", "float32"), num_images=600)
        with pytest.raises(FailureError, match="is full"):
            write(disk / "t.zarr", manifest)
        subprocess.run(["mount", "-o", "remount,size=20M", disk], check=True)
        assert StoreWriter.open_or_resume(disk / "t.zarr", manifest).rows_done > 0
        write(disk / "t.zarr", manifest)
        write(tmp_path / "whole", manifest)
        assert files(disk / "t.zarr") == files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_differences_are_named_one_by_one_and_kept_short():
    stored = {"recipe": {"crops": [{"blur": 1.0, "size": 224}]}, "view_ids": [0, 1]}
    asked = {"recipe": {"crops": [{"blur": 0.5, "size": 224}]}, "view_ids": list(range(10**6))}
    crops, view_ids = differing(stored, asked)
    assert crops == "recipe.crops.0.blur is 1.0 in the store, not 0.5"
    assert view_ids.startswith("view_ids is [0, 1] in the store, not [0, 1, 2, ")
    assert len(view_ids) < 150
