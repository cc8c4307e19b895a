"""Writing a store that may be killed, or find the disk full, at any moment; and by one process at a time."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rob.common import places
from rob.common.errors import FailureError, MisuseError
from rob.common.store.encodings import Encoding
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from support.stores import (
    ENCODINGS,
    chunk_of,
    files,
    manifest_of,
    prototypes,
    write,
)

HOLD = """
import sys
from pathlib import Path
from support import stores
writer = stores.write(Path(sys.argv[1]), stores.manifest_of(stores.ENCODINGS[0]), stop=16)
print("written", flush=True)
sys.stdin.read()
"""


def test_one_process_writes_a_store_at_a_time(tmp_path):
    path, manifest = tmp_path / "t.zarr", manifest_of(ENCODINGS[0])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes) as other:
        assert other.stdout.readline()
        before = files(path)
        with pytest.raises(MisuseError, match="another rob cache-teacher is writing this store; wait for it"):
            write(path, manifest)
        assert files(path) == before
        other.kill()
    write(path, manifest)  # the dead let go
    assert TargetStore.open(path).verify() == []
    assert not (path / "pending").exists()


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
        patch.setattr(places.shutil, "rmtree", dying(places.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "t.zarr", manifest)
    with contextlib.suppress(MisuseError):  # already complete: it died after its very last step
        write(tmp_path / "t.zarr", manifest)
    assert files(tmp_path / "t.zarr") == files(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_sigkill_at_random_moments(tmp_path):
    # In a process of its own, because only one without threads may fork; forks, because importing takes seconds.
    script = "import sys; from pathlib import Path; import test_writer; test_writer.kill_and_resume(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "t.zarr")], cwd=Path(__file__).parent, check=True)
    manifest = manifest_of(ENCODINGS[1], num_images=400)
    write(tmp_path / "whole", manifest)
    assert files(tmp_path / "t.zarr") == files(tmp_path / "whole")


def kill_and_resume(path: Path) -> None:
    """Writes a store with writers in turn, each killed once some more files came or went, until the seventh or the end."""
    rng, progress = random.Random(0), []
    while len(progress) < 7 and not (path / "zarr.json").exists():
        child = start_writing(path)
        seen, changes = None, rng.randrange(1, 20)
        while changes and os.waitpid(child, os.WNOHANG)[0] == 0:
            found = {name for _, _, names in os.walk(path) for name in names}
            seen, changes = found, changes - (found != seen)
        if changes:
            break  # it ended before
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
