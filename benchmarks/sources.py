"""The same small images packed from a folder, a list, a tar and a Parquet file: images a second, and memory.

    python -m rob.benchmarks.sources FOLDER [--images 100000] [--rounds 3]

FOLDER has image files, one folder a class (CIFAR-10 as JPEGs, of which those kept byte for byte cost a decoding each); they are
taken again under other names until there are enough. Each pack is a process of its own, which opens its source, packs, and tells
its seconds, its processor's seconds and its greatest memory; sources take turns. A fifth of the images first: what memory grows
by from there is what names and rows take.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

PACK = """
import json, sys, time
from pathlib import Path
from rob.common.images.config import PackConfig
from rob.common.images.pack import pack

began, used = time.perf_counter(), time.process_time()
manifest = pack(PackConfig(sys.argv[1], Path(sys.argv[2])))
seconds, used = time.perf_counter() - began, time.process_time() - used
status = Path("/proc/self/status").read_text()  # getrusage's maximum is at least that of the process that started this one
peak = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"seconds": seconds, "cpu": used, "peak": peak, "fingerprint": manifest.fingerprint}))
"""
LESS = 5
CPU = "cpu_microseconds_an_image"
"""What counts where other work is on the same cores."""


def images_of(folder: Path, count: int) -> Iterator[tuple[str, Path]]:
    """A name, ``CLASS/NUMBER.jpg``, and the file that has its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.suffix == ".jpg")
    for number in range(count):
        file = files[number * len(files) // count] if count <= len(files) else files[number % len(files)]
        yield f"{file.parent.name}/{number:07}.jpg", file


def write_sources(images: Path, count: int, out: Path) -> dict[str, Path]:
    """The images as each kind of source."""
    import pyarrow as pa
    from pyarrow import parquet

    places = {
        "folder": out / "folder",
        "list": out / "list.csv",
        "tar": out / "all.tar",
        "parquet": out / "all.parquet",
    }
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.string()})
    found = sorted(images_of(images, count))
    with (
        tarfile.open(places["tar"], "w") as tar,
        parquet.ParquetWriter(places["parquet"], schema) as table,
        places["list"].open("w") as rows,
    ):
        rows.write("path,label\n")
        for first in range(0, count, 1000):
            group = []
            for name, file in found[first : first + 1000]:
                data, label = file.read_bytes(), name.partition("/")[0]
                (places["folder"] / name).parent.mkdir(parents=True, exist_ok=True)
                (places["folder"] / name).write_bytes(data)
                rows.write(f"folder/{name},{label}\n")
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                group.append({"image": {"bytes": data, "path": name}, "label": label})
            table.write_table(pa.Table.from_pylist(group, schema))
    return places


def packed(source: Path, out: Path) -> dict[str, Any]:
    words = [sys.executable, "-c", PACK, str(source), str(out)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()

    import torch

    from rob.benchmarks.report import Report
    from rob.common.cores import usable_cores

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for count in (asked.images // LESS, asked.images):
            folder = Path(name) / str(count)
            folder.mkdir()
            places = write_sources(asked.folder, count, folder)
            runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in places}
            for _ in range(asked.rounds if count == asked.images else 1):
                for kind, place in places.items():
                    runs[kind].append(packed(place, folder / "data.beton"))
            assert len({run["fingerprint"] for found in runs.values() for run in found}) == 1
            for kind, found in runs.items():
                middle = {what: median(run[what] for run in found) for what in ("seconds", "cpu", "peak")}
                rows.append(
                    {
                        "source": kind,
                        "images": count,
                        "images_per_second": count / middle["seconds"],
                        CPU: 1e6 * middle["cpu"] / count,
                        "peak_mb": middle["peak"] / 1e3,
                    }
                )
    least, most = (
        {row["source"]: row for row in rows if row["images"] == n} for n in (asked.images // LESS, asked.images)
    )
    ratios: dict[str, float | None] = {}
    speed, cpu = ({name: row[what] for name, row in most.items()} for what in ("images_per_second", CPU))
    for kind in most:
        ratios[f"{kind}_vs_folder"] = speed[kind] / speed["folder"]
        ratios[f"{kind}_vs_folder_by_cpu"] = cpu["folder"] / cpu[kind]
        more = most[kind]["peak_mb"] - least[kind]["peak_mb"]
        ratios[f"{kind}_bytes_of_memory_an_image_more"] = 1e6 * more / (asked.images - asked.images // LESS)
    ratios["slowest_vs_fastest"] = min(speed.values()) / max(speed.values())
    ratios["slowest_vs_fastest_by_cpu"] = min(cpu.values()) / max(cpu.values())
    work = {
        "images": asked.images,
        "rounds": asked.rounds,
        "cores": usable_cores(),
        "load_average": os.getloadavg()[0],
    }
    report = Report.of("sources", torch.device("cpu"), work, rows, ratios)
    report.show()
    print(report.write())


if __name__ == "__main__":
    main()
