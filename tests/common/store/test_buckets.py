"""A store at an address is the one that lies on a disk; what goes wrong is a sentence that holds no key."""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rob.common import bucket, places
from rob.common.errors import FailureError, MisuseError
from rob.common.images import copied
from rob.common.images.beton import Beton
from rob.common.images.config import PackConfig
from rob.common.images.pack import pack
from rob.common.look.contents import inspect
from rob.common.places import place_of
from rob.common.store.prefetch import TargetPrefetcher
from rob.common.store.reader import TargetStore
from rob.common.store.writer import StoreWriter
from support.stores import ENCODINGS, chunk_of, files, manifest_of, prototypes, write
from support.tiny import contents, tiny_beton, tiny_images

pytest.importorskip("obstore")
SECRET = "wJalrXUtnFEMI-a-secret"
KINDS = ["memory", "s3"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a real S3 server: of the one that ROB_S3_SERVER names, else of moto's."""
    if given := os.environ.get("ROB_S3_SERVER"):
        yield given
        return
    needs = "needs moto, an S3 server (pip install 'moto[s3,server]'), or ROB_S3_SERVER"
    pytest.importorskip("moto.server", reason=needs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]) as process:
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest, monkeypatch) -> str:
    """An address with nothing at it."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    if request.param == "memory":
        return f"memory://{name}"
    as_user(monkeypatch, request.getfixturevalue("server"))
    for _ in range(100):
        try:
            made = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{name}", method="PUT")
            urllib.request.urlopen(made).close()
            return f"s3://{name}/below"
        except urllib.error.URLError:
            time.sleep(0.1)  # it is still starting
    raise AssertionError("the server does not start")


def as_user(monkeypatch, server: str) -> None:
    told = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    for name, value in {**told, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    bucket._opened.cache_clear()
    monkeypatch.setattr(bucket, "PATIENCE", timedelta(seconds=1))


def at(address: str) -> dict[str, bytes]:
    place = place_of(address)
    return {name: place.read(name) for name in place.names()}


def test_what_is_written_and_read(root, tmp_path):
    """Also by a writer that was killed: it costs the shard that it was at."""
    for number, encoding in enumerate(ENCODINGS[1:3]):
        manifest, out = manifest_of(encoding), Path(f"{root}/{number}.zarr")
        write(tmp_path / f"{number}.zarr", manifest)
        writer = write(out, manifest, stop=40)
        assert writer.rows_done == 40
        del writer
        assert StoreWriter.open_or_resume(out, manifest).rows_done == 24  # of a whole shard
        with pytest.raises(MisuseError, match=rf"^{root}/{number}\.zarr is half-written, 24 of 70 rows are done"):
            TargetStore.open(out)
        write(out, manifest)
        assert at(f"{root}/{number}.zarr") == files(tmp_path / f"{number}.zarr")
        store, local = TargetStore.open(out), TargetStore.open(tmp_path / f"{number}.zarr")
        assert store.verify() == []
        np.testing.assert_array_equal(store.statistics["embedding_sum"], local.statistics["embedding_sum"])
        assert dict(inspect(out).rows) == dict(inspect(tmp_path / f"{number}.zarr").rows)
        with TargetPrefetcher(store, 8) as ahead, TargetPrefetcher(local, 8) as expected:
            assert ahead.threads == bucket.AT_ONCE
            order = np.random.default_rng(0).permutation(70)
            for found, known in zip(ahead.epoch(order), expected.epoch(order), strict=True):
                for name, values in known.targets.items():
                    assert (found.targets[name] == values).all()
    assert places.place_of(f"file://{tmp_path}/0.zarr").exists("zarr.json")
    assert TargetStore.open(f"file://{tmp_path}/0.zarr").path == tmp_path / "0.zarr"


def test_workers_that_make_the_same_shard(root, tmp_path):
    """Nobody can hold one there: it costs time, and changes nothing."""
    manifest, out = manifest_of(ENCODINGS[1]), Path(f"{root}/t.zarr")
    write(tmp_path / "t.zarr", manifest)
    one, other = (StoreWriter.open_or_resume(out, manifest, "ranks") for _ in range(2))
    for writer in (one, other, one, other, one, other):
        if (row := writer.claim(min(writer.missing(), default=0))) is not None:
            writer.append(*chunk_of(manifest, row))
    for writer in (one, other):
        while writer.missing():
            row = writer.claim(writer.missing()[0])
            writer.append(*chunk_of(manifest, row))
        writer.finish(prototypes().numpy())
    assert at(f"{root}/t.zarr") == files(tmp_path / "t.zarr")


def test_a_worker_that_is_finished_for_while_it_finishes(root, tmp_path, monkeypatch):
    """What it reads last is dropped by the other one."""
    manifest, out = manifest_of(ENCODINGS[1]), Path(f"{root}/t.zarr")
    write(tmp_path / "t.zarr", manifest)
    one, other = (StoreWriter.open_or_resume(out, manifest, "ranks") for _ in range(2))
    while one.missing():
        one.append(*chunk_of(manifest, one.claim(one.missing()[0])))
    statistics = StoreWriter.statistics.fget

    def late(writer: StoreWriter):
        if writer is other:
            one.finish(prototypes().numpy())
        return statistics(writer)

    monkeypatch.setattr(StoreWriter, "statistics", property(late))
    other.finish(prototypes().numpy())
    assert at(f"{root}/t.zarr") == files(tmp_path / "t.zarr")


def test_damage_in_a_bucket(root, tmp_path):
    write(Path(f"{root}/t.zarr"), manifest_of(ENCODINGS[0]))
    place = place_of(f"{root}/t.zarr")
    shard = "embedding/c/1/0/0"
    data = bytearray(place.read(shard))
    data[20] ^= 1
    place.write(shard, bytes(data))
    (damaged,) = TargetStore.open(f"{root}/t.zarr").verify()
    assert damaged.startswith(f"{root}/t.zarr: chunk 3 of array 'embedding' (images 24 to 31) is damaged")
    place.remove(shard)
    with pytest.raises(FailureError, match=rf"is damaged, {root}/t\.zarr/{shard} is missing"):
        TargetStore.open(f"{root}/t.zarr")


def test_addresses_that_cannot_be(root):
    with pytest.raises(MisuseError, match=rf"there is no target store at {root}/none\.zarr: make one"):
        TargetStore.open(f"{root}/none.zarr")
    for address, message in {
        f"s3://key:{SECRET}@b/t.zarr": "an address of s3:// must hold no key or password",
        f"az://b/t.zarr?sig={SECRET}": "an address of az:// must hold no key or password",
        "ftp://b/t.zarr": "ftp:// is no address of a store: give a path, or s3://, gs://, az:// or file://",
    }.items():
        with pytest.raises(MisuseError, match=message.replace("?", r"\?")) as refused:
            TargetStore.open(address)
        assert SECRET not in str(refused.value)
    place_of(root).write("other/file", b"x")
    with pytest.raises(MisuseError, match="is already there and is not a target store"):
        write(Path(f"{root}/other"), manifest_of(ENCODINGS[0]))


# ==== servers that fail: a plain one, of answers that are given ====


class Answers(ThreadingHTTPServer):
    """Gives one answer to whatever is asked."""

    status, body = 200, b""
    daemon_threads = True

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(self.server.status)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b"" if self.command == "HEAD" else self.server.body
                self.send_header("Content-Length", f"{len(body)}")
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_POST = do_PUT = do_GET
            log_message = lambda *_: None  # noqa: E731

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self._serving = threading.Thread(target=self.serve_forever)
        self._serving.start()

    def close(self) -> None:
        if self._serving.is_alive():
            self.shutdown()
            self._serving.join()
            self.server_close()


@pytest.fixture
def answers() -> Iterator[Answers]:
    server = Answers()
    yield server
    server.close()


def test_a_server_that_fails_is_a_sentence_without_a_key(answers, monkeypatch):
    as_user(monkeypatch, answers.address)
    for status, kind, message in (
        (403, MisuseError, "s3://b/t.zarr cannot be read: no rights; the keys come from the environment"),
        (401, MisuseError, "s3://b/t.zarr cannot be read: no rights"),
        (
            503,
            FailureError,
            "s3://b/t.zarr cannot be read: the server answers 503, tried for up to 1 s; what is written is",
        ),
        (404, MisuseError, "there is no target store at s3://b/t.zarr"),
    ):
        answers.status = status
        with pytest.raises(kind, match=message) as refused:
            TargetStore.open("s3://b/t.zarr")
        assert SECRET not in str(refused.value)
        assert refused.value.__cause__ is None
    answers.status, answers.body = 404, b"<Error><Code>NoSuchBucket</Code></Error>"
    with pytest.raises(MisuseError, match=r"^s3://b/t\.zarr cannot be listed: the server has no bucket of this name"):
        place_of("s3://b/t.zarr").names()
    answers.status, answers.body = 403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
    with pytest.raises(MisuseError, match="cannot be listed: no rights; the keys come from the environment"):
        place_of("s3://b/t.zarr").names()
    answers.status, answers.body = 400, b""
    with pytest.raises(FailureError, match="cannot be listed: the server answers 400; what is written"):
        place_of("s3://b/t.zarr").names()
    answers.status = 200
    answers.body = b"<DeleteResult><Error><Key>t.zarr/x</Key><Code>AccessDenied</Code><Message/></Error></DeleteResult>"
    with pytest.raises(MisuseError, match=r"s3://b/t\.zarr cannot be written to: no rights"):
        place_of("s3://b/t.zarr").remove("x")
    answers.close()
    with pytest.raises(FailureError, match=r"s3://b/t\.zarr cannot be read: there is no connection to the server"):
        TargetStore.open("s3://b/t.zarr")


def test_folders_made_in_a_console_are_no_files(answers, monkeypatch):
    """Which are empty objects with a slash at their end, and are listed without it."""
    as_user(monkeypatch, answers.address)
    place = place_of("s3://b/t")

    def listed(*keys: str) -> None:
        rows = "".join(
            f"<Contents><Key>t/{key}</Key><Size>{0 if not key or key.endswith('/') else 5}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        answers.body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()

    listed("", "one/", "one/two/", "one/two/a.jpg", "b.jpg")
    assert place.names() == {"one/two/a.jpg", "b.jpg"}
    assert not place.holds_other({"one", "b.jpg"})
    listed("one/", "one/a.jpg")
    assert place.names("one") == {"a.jpg"}
    listed("one//a.jpg")
    with pytest.raises(
        MisuseError, match=r"s3://b/t cannot be listed: there is an object whose name is no path, with //"
    ):
        place.names()


def test_images_there_are_packed_as_from_a_disk(root, tmp_path):
    folder = tiny_images(tmp_path / "images", 8)
    files, place = contents(folder), place_of(f"{root}/images")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name, data in files.items():
            place.write(name, data)
            tar.add(folder / name, name)
    rows = "".join(f"../images/{name},{name[:6]}\n" for name in files)
    place_of(f"{root}/other").write("list.csv", rows.encode())
    place_of(f"{root}/other").write("all.tar", (tmp_path / "all.tar").read_bytes())
    config = PackConfig(str(folder), tmp_path / "data.beton")
    expected = pack(config)
    for source in ("images", "other/all.tar", "other/list.csv", "other/*.tar"):
        found = pack(replace(config, source=f"{root}/{source}"))
        assert (found.fingerprint, found.labels) == (expected.fingerprint, expected.labels)
    before = contents(tmp_path)
    for source, message in (
        ("nowhere", "/nowhere: there is nothing at this address"),
        ("other/a.tar", "/other/a.tar: there is no such file"),
        ("other/a*.parquet", "no file fits this pattern"),
    ):
        with pytest.raises(MisuseError, match=message):
            pack(replace(config, source=f"{root}/{source}"))
    assert contents(tmp_path) == before


def test_images_on_a_web_server_and_where_fsspec_reaches(tmp_path):
    folder = tiny_images(tmp_path / "images", 6)
    names = list(contents(folder))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, "images")
    (tmp_path / "list.txt").write_text("".join(f"images/{name}\t{name[:6]}\n" for name in names))
    config = PackConfig(str(folder), tmp_path / "data.beton")
    expected = pack(config).fingerprint
    assert pack(replace(config, source=f"local://{folder}")).fingerprint == expected
    assert pack(replace(config, source=f"local://{tmp_path}/all.tar")).num_images == 6
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # which gives no parts of files
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert pack(replace(config, source=f"{address}/list.txt")).fingerprint == expected
        with pytest.raises(MisuseError, match="cannot be read: the server gives no parts of files; copy them here"):
            pack(replace(config, source=f"{address}/all.tar"))
        server.shutdown()


def test_without_keys_it_says_so_at_once(tmp_path, monkeypatch):
    for name in bucket.S3_KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        MisuseError, match=r"^s3://b/images cannot be opened: there are no keys in the environment \(AWS"
    ):
        pack(PackConfig("s3://b/images", tmp_path / "data.beton"))


def test_a_bucket_that_is_lost_in_the_middle_costs_nothing(tmp_path, monkeypatch):
    """At each request of writing a store, and while targets are read: one sentence, and the same again goes on."""
    manifest = manifest_of(ENCODINGS[1])
    write(tmp_path / "t.zarr", manifest)
    left = [0]

    def lost(function):
        def asked(self, *given):
            left[0] -= 1
            if left[0] == 0:
                raise FailureError("the bucket is lost")
            return function(self, *given)

        return asked

    for number in range(1, 80, 3):
        out = Path(f"memory://lost/{number}.zarr")
        with monkeypatch.context() as patch, pytest.raises(FailureError, match="is lost"):
            for name in ("read", "write", "names", "exists", "remove"):
                patch.setattr(bucket.Bucket, name, lost(getattr(bucket.Bucket, name)))
            left[0] = number
            write(out, manifest)
        if not place_of(out).exists("zarr.json"):  # it was dropping what is under pending/
            write(out, manifest)
        found = {name: data for name, data in at(str(out)).items() if not name.startswith("pending/")}
        assert found == files(tmp_path / "t.zarr")

    with monkeypatch.context() as patch, pytest.raises(FailureError, match="is lost"):
        patch.setattr(bucket.Bucket, "read_part", lost(bucket.Bucket.read_part))
        left[0] = 3
        with TargetPrefetcher(TargetStore.open(out), 8) as ahead:
            list(ahead.epoch(np.arange(70)))


# ==== packed images ====


@pytest.fixture
def packed(root, tmp_path) -> tuple[Beton, str]:
    data = tiny_beton(tmp_path, 12)
    place = place_of(root)
    for name in (data.path.name, f"{data.path.name}.json"):
        place.write(name, (data.path.parent / name).read_bytes())
    return data, f"{root}/{data.path.name}"


def test_packed_images_are_copied_once(packed, tmp_path, monkeypatch):
    data, address = packed
    monkeypatch.setattr(copied, "PIECE", 4096)
    reads = []
    read_part = bucket.Bucket.read_part
    monkeypatch.setattr(bucket.Bucket, "read_part", lambda *given: reads.append(given[2]) or read_part(*given))
    monkeypatch.setenv("ROB_LOCAL_DIR", str(tmp_path / "local"))
    found = Beton(Path(address))
    assert found.path.read_bytes() == data.path.read_bytes()
    assert found.path.is_relative_to(tmp_path / "local")
    assert [path.name for path in found.path.parent.iterdir() if path.suffix not in (".beton", ".json")] == []
    pieces = len(reads)
    assert sorted(reads) == list(range(0, data.path.stat().st_size, 4096))
    Beton(Path(address))
    assert len(reads) == pieces

    reads.clear()  # broken off in the middle: it goes on there
    part = found.path.with_name(f"{found.path.name}.part")
    found.path.rename(part)
    os.truncate(part, 9000)
    shutil.copy(f"{found.path}.json", f"{part}.json")
    assert Beton(Path(address)).path.read_bytes() == data.path.read_bytes()
    assert min(reads) == 9000

    other = tiny_beton(tmp_path, 7, seed=1)  # another file at the same address
    place = place_of(address.rpartition("/")[0])
    place.write(data.path.name, other.path.read_bytes())
    place.write(f"{data.path.name}.json", Path(f"{other.path}.json").read_bytes())
    assert Beton(Path(address), tmp_path / "local").num_images == 7


def test_a_copy_that_is_damaged_or_cannot_be(packed, tmp_path):
    data, address = packed
    place = place_of(address.rpartition("/")[0])
    broken = bytearray(data.path.read_bytes())
    broken[int(data.pointers[3]) + 30] ^= 1
    place.write(data.path.name, bytes(broken))
    with pytest.raises(FailureError, match=rf"the copy of {address} is not what was packed \(image 3 is damaged\)"):
        Beton(Path(address), tmp_path / "local")
    assert list((tmp_path / "local").rglob("*.beton*")) == [*(tmp_path / "local").rglob("*.part.json")]
    place.remove(f"{data.path.name}.json")
    with pytest.raises(MisuseError, match=rf"there is no {address}, or no {data.path.name}\.json beside it"):
        Beton(Path(address), tmp_path / "local")


def test_many_are_in_flight(monkeypatch):
    """While one is waited for, others are asked: with the latency of a bucket an epoch takes a few of them, not one a chunk."""
    manifest = manifest_of(ENCODINGS[0], num_images=800)
    write(Path("memory://in-flight/t.zarr"), manifest)
    store = TargetStore.open("memory://in-flight/t.zarr")
    here, most, lock = [0], [0], threading.Lock()
    read_part = bucket.Bucket.read_part

    def slow(*given):
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        time.sleep(0.02)
        with lock:
            here[0] -= 1
        return read_part(*given)

    monkeypatch.setattr(bucket.Bucket, "read_part", slow)
    with TargetPrefetcher(store, 50) as ahead:
        assert sum(len(batch.image_ids) for batch in ahead.epoch(np.arange(800))) == 800
    assert most[0] > bucket.AT_ONCE // 4
