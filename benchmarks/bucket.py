"""A store in a bucket 50 ms away: how many images a second its targets are there for, and what a ViT-Tiny student waits for them.

    python -m rob.benchmarks.bucket [--images 16384] [--milliseconds 50] [--turns 2]

The bucket is a server on the loopback that speaks as much of S3 as is asked of it and answers each request so much later; it is
obstore that asks, as it would Amazon's. First the targets alone, by the number of requests in flight and from the disk beside;
then a real student, ViT-Tiny at 64 px, in turns from the disk and from the bucket: the share of its time that it waited for
targets. A GPU's student takes 5,000 to 20,000 images a second: it is the first table that says whether it would wait.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUCKET = "targets"


def serve(folder: Path, seconds: float) -> None:
    """The files below ``folder`` as the objects of one bucket, each answer so much later; the port is printed first."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *_: Any) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            time.sleep(seconds)
            asked = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(asked.query, keep_blank_values=True).items()}
            if "list-type" in query:
                return self.answer(200, self.listing(query.get("prefix", "")))
            path = self.file(asked.path)
            if not path.is_file():
                return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            size = path.stat().st_size
            first, last = self.part(size)
            with path.open("rb") as file:
                file.seek(first)
                data = file.read(last - first)
            whole = len(data) == size
            self.answer(
                200 if whole else 206,
                data,
                {} if whole else {"Content-Range": f"bytes {first}-{last - 1}/{size}"},
                size,
            )

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            """An object, whole or not at all, or a copy of another one."""
            time.sleep(seconds)
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if (other := self.headers.get("x-amz-copy-source")) is not None:
                source = self.file(f"/{unquote(other).lstrip('/')}")
                if not source.is_file():
                    return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                data = source.read_bytes()
            path = self.file(urlsplit(self.path).path)
            path.parent.mkdir(parents=True, exist_ok=True)
            (part := path.with_name(f".{path.name}.{threading.get_ident()}.part")).write_bytes(data)
            part.replace(path)
            self.answer(200, b"<CopyObjectResult><ETag>x</ETag></CopyObjectResult>" if other else b"")

        def do_POST(self) -> None:
            """Objects that go, of which the body tells the names; their folders too, since a bucket has none."""
            time.sleep(seconds)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            names = [unescape(name) for name in re.findall("<Key>(.*?)</Key>", body)]
            for name in names:
                path = folder / name
                path.unlink(missing_ok=True)
                with suppress(OSError):  # there is something else in it
                    for above in path.relative_to(folder).parents[:-1]:
                        (folder / above).rmdir()
            gone = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())

        def file(self, path: str) -> Path:
            return folder / unquote(path).removeprefix(f"/{BUCKET}/")

        def part(self, size: int) -> tuple[int, int]:
            if (wanted := self.headers.get("Range")) is None:
                return 0, size
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            return (size - int(last), size) if not first else (int(first), int(last) + 1 if last else size)

        def listing(self, prefix: str) -> bytes:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            named = [(file, str(file.relative_to(folder))) for file in files]
            rows = "".join(
                f"<Contents><Key>{escape(name)}</Key><Size>{file.stat().st_size}</Size><ETag>x</ETag>"
                f"<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for file, name in named
                if name.startswith(unquote(prefix))
            )
            return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()

        def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, size: int = 0) -> None:
            self.send_response(status)
            length = size if self.command == "HEAD" and size else len(data)
            told = {"Content-Length": str(length), "ETag": '"x"', "Last-Modified": formatdate(usegmt=True)}
            for name, value in {**told, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.request_queue_size = 128
    server.handle_error = lambda request, client_address: None  # who asks may be killed
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def bucket(folder: Path, milliseconds: float) -> Iterator[None]:
    """Inside, ``s3://targets`` are the files below ``folder``."""
    words = [sys.executable, "-m", "rob.benchmarks.bucket", "--serve", str(folder), "--milliseconds", str(milliseconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ.update(AWS_ENDPOINT_URL=address, AWS_SKIP_SIGNATURE="true", AWS_REGION="here")
        try:
            yield
        finally:
            server.kill()


def write_store(path: Path, data: Any, recipe: dict[str, Any]) -> None:
    """Embeddings of 384 numbers as int8, 4 views an image, at random."""
    import numpy as np

    from rob.common.store.encodings import Encoding
    from rob.common.store.manifest import StoreManifest
    from rob.common.store.writer import StoreWriter

    manifest = StoreManifest(
        data.manifest.fingerprint, data.num_images, recipe, 0, (0, 1, 2, 3), 64, "random", "0", "none", 384, 0, None,
        Encoding("embedding", "int8").to_dict(), "fp32", "planes", {},
    )  # fmt: skip
    random = np.random.default_rng(0)
    writer = StoreWriter.open_or_resume(path, manifest)
    while (row := writer.rows_done) < data.num_images:
        rows = min(manifest.chunk_rows, data.num_images - row)
        steps = random.integers(-127, 128, (rows, 4, 384)).astype(np.int8)
        arrays = {"embedding": steps, "scale": np.full((rows, 4), 1 / 1500, np.float16)}
        writer.append(arrays, {"embedding_sum": steps.sum((0, 1)) / 1500.0})
    writer.finish()


def targets_alone(address: Path | str, threads: int | None) -> float:
    """Images/s of an epoch in training's order, batches of 256: the median of three, behind one that opens connections."""
    from rob.benchmarks.report import median_of
    from rob.common.order import block_shuffled_order
    from rob.common.store.prefetch import TargetPrefetcher
    from rob.common.store.reader import TargetStore

    store = TargetStore.open(address)
    order = block_shuffled_order(store.manifest.num_images, 256, 16, 0, 0)
    with TargetPrefetcher(store, 256, threads=threads) as ahead:
        return len(order) / median_of(lambda: [None for _ in ahead.epoch(order)], 3)


def student(data: Path, address: str, out: Path) -> dict[str, float]:
    """One epoch."""
    import rob

    config = rob.TrainConfig(
        data, out, rob.StudentConfig("vit_tiny_patch16_224", 64, False), rob.Cached(Path(address)),
        objective=rob.ObjectiveConfig("embedding"), pairing=rob.PairingConfig("same", 1), epochs=1,
        optimiser=rob.OptimiserConfig(warmup_epochs=0.0), loader=rob.LoaderConfig(batch_size=64), device="cpu", log_every=5,
    )  # fmt: skip
    result = rob.train_student(config)
    return {"images_per_second": result.images_per_second, **{f"share_{k}": v for k, v in result.shares.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=16_384)
    parser.add_argument("--milliseconds", type=float, default=50.0, help="from a request to its answer")
    parser.add_argument("--turns", type=int, default=2, help="epochs of a student from each; 0: the targets alone")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve is not None:
        serve(asked.serve, asked.milliseconds / 1e3)
        return

    import torch

    from rob.benchmarks.checks import pack_tiny
    from rob.benchmarks.report import Report
    from rob.common.images.beton import Beton
    from rob.common.views.recipes import get_recipe

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack_tiny(folder / "data.beton", asked.images)
        write_store(folder / "bucket" / "t.zarr", Beton(folder / "data.beton"), get_recipe("dino").to_dict())
        with bucket(folder / "bucket", asked.milliseconds):
            here, there = str(folder / "bucket" / "t.zarr"), f"s3://{BUCKET}/t.zarr"
            found.append({"targets": "from the disk", "images_per_second": targets_alone(here, None)})
            for threads in (1, 2, 8, 32):
                speed = targets_alone(there, threads)
                found.append({"targets": f"from the bucket, {threads} in flight", "images_per_second": speed})
            for turn in range(asked.turns):
                for where, address in (("disk", here), ("bucket", there)):
                    out = folder / f"{where}-{turn}"
                    seen = student(folder / "data.beton", address, out)
                    found.append({"targets": f"ViT-Tiny, from the {where}", **seen})
    work = {"images": asked.images, "views": 4, "numbers": 384, "milliseconds": asked.milliseconds}
    report = Report.of("bucket", torch.device("cpu"), work, found, {})
    report.show()
    print(report.write())


if __name__ == "__main__":
    main()
