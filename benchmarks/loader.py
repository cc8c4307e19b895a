"""Images to views, against its peers and its floor: the same photographs, the same crops, in one run.

    rob bench loader
    python -m rob.benchmarks.loader cifar10     and what an image costs among 2,000 and among all

500 x 375 JPEGs (quality 90) to 2 views of 224 and 6 of 96 pixels, geometry only, on all cores. The sides take turns, round by
round, so that the machine's noise falls on all alike; the first round warms up (ffcv compiles in it). Both filters are in one
run: bicubic, the recipe's own, and bilinear. ffcv and cv2 have INTER_AREA instead, since their cubic one is not antialiased. Our
views must be within 38 dB of Pillow's before the times count: within that, ours may decode a photograph at a half of its size or
less, where all its views allow it. The peers decode it whole and need not flip; the bare loops need not make batches either.

Where there is a GPU, more rows: views made on it, against decoding alone, and the view kernel alone against a copy, counted in
bytes read and written. Without one the report says so; these rows have not been run yet (`rob gpu-check` is what ran).
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from rob.benchmarks.loader_peers import (
    RECIPES,
    SEED,
    SIZES,
    VIEWS,
    ffcv_side,
    geometry_of,
    loop_side,
    resize_with_cv2,
    resize_with_torchvision,
    torchvision_side,
)
from rob.benchmarks.photographs import HEIGHT, WIDTH, make_photographs
from rob.benchmarks.report import Report, parts
from rob.common.images.beton import Beton
from rob.common.images.pack import PackConfig, pack
from rob.common.views.colours import apply_colours
from rob.common.views.decode import decode_planes, decoder_handle, plane_starts
from rob.common.views.drawing import CROP_HEIGHT, CROP_WIDTH
from rob.common.views.loader import Batch, LoaderConfig, ViewLoader, ViewSet
from rob.common.views.pillow_backend import resize_view
from rob.common.views.planes import FACTOR_X, FACTOR_Y, LAYOUT_COLUMNS, SCALE
from rob.common.views.recipes import Recipe, RecipeOverrides, get_recipe

PLAIN = RecipeOverrides(colour=0.0, grey=0.0, blur=0.0, solarise=0.0)


@dataclass(frozen=True)
class LoaderBenchConfig:
    images: int = 768
    rounds: int = 5
    """Each side's median is over so many, after one that warms up."""
    batch_size: int = 64
    psnr_images: int = 96
    """How many images' views are compared with Pillow's."""
    small_images: str | None = None
    """A folder or a named data set of 10,000s of small images, for the rows that show a flat cost."""


def run(config: LoaderBenchConfig) -> Report:
    """Raises AssertionError when our views differ from Pillow's by more than 38 dB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_photographs(folder / "photographs", config.images)
        pack(PackConfig(str(folder / "photographs"), folder / "data.beton"))
        data = Beton(folder / "data.beton")
        worst = {name: worst_psnr(data, config, recipe) for name, recipe in RECIPES.items()}
        for name, psnr in worst.items():
            assert psnr > 38, f"a {name} view is only within {psnr:.1f} dB of Pillow's"
        rows = compare(data, config)
        of_copy = kernel_rows(data, config, rows) if torch.cuda.is_available() else None
        if config.small_images:
            rows += linear_cost(folder, config.small_images)
    speed = {row["side"]: row["images_per_second"] for row in rows if "images_per_second" in row}
    ratios: dict[str, float | None] = {}
    for name in RECIPES:
        peers = {
            "vs_ffcv_per_view": speed["ffcv, one pipeline a view, area"],
            "vs_torchvision": speed[f"torchvision v2, PIL, DataLoader, {name}"],
            "vs_best_resize": max(speed["one decode, cv2, area"], speed[f"one decode, torchvision uint8, {name}"]),
            "of_decode_only": speed["decode only, planes"],
        }
        ratios |= {f"{ratio}_{name}": speed[f"rob, {name}"] / peer for ratio, peer in peers.items()}
    ratios |= {
        "gpu_of_decode_only": speed["rob, views on the GPU, bicubic"] / speed["decode only, planes"]
        if of_copy
        else None,
        "kernel_of_copy_bandwidth": of_copy,
    }
    work = {
        "images": f"{config.images} JPEGs of {WIDTH} x {HEIGHT}, quality 90, cut out of {source}",
        "views": "2 x 224 + 6 x 96",
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        **{f"worst_psnr_against_pillow_{name}": psnr for name, psnr in worst.items()},
        "gpu": torch.cuda.get_device_name() if of_copy else "none: views on a GPU are not measured",
    }
    return Report.of("loader", torch.device("cpu"), work, rows, ratios)


def worst_psnr(data: Beton, config: LoaderBenchConfig, recipe: Recipe) -> float:
    geometry, worst = geometry_of(data), np.inf
    loader = ViewLoader(data, recipe, SEED, LoaderConfig("ffcv", config.batch_size))
    for batch in loader.epoch(np.arange(min(config.psnr_images, data.num_images)), VIEWS):
        for b, i in enumerate(batch.image_ids):
            image, views = Image.fromarray(data.image(i)), [view for s in batch.views for view in s[b]]
            for view, crop, size in zip(views, geometry[i].tolist(), SIZES, strict=True):
                error = view.permute(1, 2, 0).numpy().astype(float) - resize_view(image, crop, size, recipe.cubic)
                worst = min(worst, 10 * np.log10(255**2 / max(1e-9, np.mean(error**2))))
    return float(worst)


def compare(data: Beton, config: LoaderBenchConfig) -> list[dict[str, Any]]:
    threads = LoaderConfig().threads
    sides: dict[str, Callable[[], int]] = {}
    for name, recipe in RECIPES.items():
        filter = v2.InterpolationMode(name)
        resize = partial(resize_with_torchvision, filter=filter)
        sides |= {
            f"rob, {name}": rob_side(data, config, recipe),
            f"rob, the plain loader, {name}": rob_side(data, config, recipe, backend="torch"),
            f"torchvision v2, PIL, DataLoader, {name}": torchvision_side(data, config.batch_size, threads, filter),
            f"one decode, torchvision uint8, {name}": loop_side(data, threads, resize),
        }
    sides |= {
        "rob, bicubic, with DINO's colours": rob_side(data, config, RECIPES["bicubic"], colours=True),
        "ffcv, one pipeline a view, area": ffcv_side(data, config.batch_size, threads),
        "one decode, cv2, area": loop_side(data, threads, resize_with_cv2),
        "decode only, RGB": loop_side(data, threads, None),
        "decode only, planes": planes_side(data, threads),
    }
    if torch.cuda.is_available():
        sides["rob, views on the GPU, bicubic"] = gpu_side(data, config)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in parts(range(1 + config.rounds)):
        for name, side in sides.items():
            start, start_cpu = time.perf_counter(), cpu_seconds()
            done = side()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(cpu_seconds() - start_cpu)
            assert done == data.num_images, name
    return [
        {
            "side": name,
            "images": data.num_images,
            "images_per_second": data.num_images / median(seconds[name][1:]),
            "cpu_ms_per_image": 1e3 * median(cpu[name][1:]) / data.num_images,
        }
        for name in sides
    ]


def cpu_seconds() -> float:
    """Spent by this process and its workers: what others do on the machine does not count in it."""
    seconds = time.process_time() + sum(os.times()[2:4])  # with that of workers that have ended
    for worker in multiprocessing.active_children():
        user, system = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(") ", 1)[1].split()[11:13]
        seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


# --- ours ---


def rob_side(
    data: Beton, config: LoaderBenchConfig, recipe: Recipe, colours: bool = False, backend: str = "ffcv"
) -> Callable[[], int]:
    loader = ViewLoader(data, recipe, SEED, LoaderConfig(backend, config.batch_size))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def epoch() -> int:
        done = 0
        for batch in loader.epoch(np.arange(data.num_images), VIEWS):
            done += len(batch.image_ids)
            if colours:
                for views, colour in zip(batch.views, batch.colour, strict=True):
                    apply_colours(views.flatten(0, 1), colour.flatten(0, 1), 1.0, mean, std)
        return done

    return epoch


def planes_side(data: Beton, threads: int) -> Callable[[], int]:
    """Our decoding alone: YCbCr planes, no view."""
    scratch = {}

    def decode(ids: np.ndarray) -> int:
        handle, scales = decoder_handle(), np.ones(len(ids), np.int64)
        starts = plane_starts(data.heights[ids], data.widths[ids], scales)
        planes = scratch.setdefault(handle, np.empty(starts[-1], np.uint8))
        layout = np.empty((len(ids), LAYOUT_COLUMNS), np.int32)
        decode_planes(
            handle, data.memory, data.pointers, data.sizes, data.modes, data.heights, data.widths,
            ids, scales, starts, planes, layout,
        )  # fmt: skip
        return len(ids)

    pool = ThreadPoolExecutor(threads)
    parts = np.split(np.arange(data.num_images), np.arange(8, data.num_images, 8))
    return lambda: sum(pool.map(decode, parts))


def gpu_batches(data: Beton, config: LoaderBenchConfig) -> Iterator[Batch]:
    """Planes on the GPU, without colours."""
    loader = ViewLoader(data, get_recipe("dino", PLAIN), SEED, LoaderConfig("gpu", config.batch_size))
    for batch in loader.epoch(np.arange(data.num_images), VIEWS):
        yield batch.to(torch.device("cuda"))


def gpu_side(data: Beton, config: LoaderBenchConfig) -> Callable[[], int]:
    mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")

    def epoch() -> int:
        done = 0
        for batch in gpu_batches(data, config):
            for number in range(len(VIEWS)):
                batch.augment(number, 1.0, mean, std, torch.bfloat16)
            done += len(batch.image_ids)
        torch.cuda.synchronize()
        return done

    return epoch


def kernel_rows(data: Beton, config: LoaderBenchConfig, rows: list[dict[str, Any]]) -> float:
    """Adds the view kernel alone and a copy of 1 GiB to ``rows``; returns the first's share of the second's bytes a second.

    Its bytes: the planes under each crop read once, the views written once in bfloat16.
    """
    from triton.testing import do_bench

    batch = next(gpu_batches(data, config))
    assert batch.planes is not None
    mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    layout, geometry = batch.planes.layout.cpu().double(), batch.planes.geometry.cpu().double()
    plane_bytes = 1 + 2 / (layout[:, FACTOR_Y] * layout[:, FACTOR_X])
    read = (
        geometry[..., CROP_HEIGHT] * geometry[..., CROP_WIDTH] * (plane_bytes / layout[:, SCALE] ** 2)[:, None]
    ).sum()
    written = len(batch.image_ids) * sum(3 * 2 * size**2 for size in SIZES)
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def make_views() -> None:
        for number in range(len(VIEWS)):
            batch.augment(number, 1.0, mean, std, torch.bfloat16)

    speeds = {}
    for side, work, count in (
        ("view kernel alone", make_views, float(read) + written),
        ("copy on the GPU", lambda: target.copy_(source), 2.0 * source.numel()),
    ):
        milliseconds: Any = do_bench(work, return_mode="median")
        speeds[side] = count / (1e-3 * milliseconds)
        rows.append({"side": side, "gigabytes_per_second": speeds[side] / 1e9})
    return speeds["view kernel alone"] / speeds["copy on the GPU"]


# --- cost against the number of images ---


def linear_cost(folder: Path, source: str) -> list[dict[str, Any]]:
    """Epochs in random order over 2,000, 10,000 and at most 60,000 images of ``source``, two views of 32 pixels."""
    rows, sets = [], [ViewSet((0, 1), 32)]
    for count in (2_000, 10_000, 60_000):
        path = folder / f"small{count}.beton"
        count = pack(PackConfig(source, path, limit=count)).num_images
        loader = ViewLoader(Beton(path), RECIPES["bicubic"], SEED, LoaderConfig("ffcv", 256))
        order = np.random.default_rng(0)
        speeds = []
        for _ in range(4):
            start, done = time.perf_counter(), 0
            while done < 10_000:
                done += sum(len(batch.image_ids) for batch in loader.epoch(order.permutation(count), sets))
            speeds.append(done / (time.perf_counter() - start))
        rows.append(
            {
                "side": f"rob, {Path(source).name}, {count:,} images",
                "images": count,
                "images_per_second": median(speeds[1:]),
            }
        )
    return rows


if __name__ == "__main__":
    report = run(LoaderBenchConfig(small_images=sys.argv[1] if sys.argv[1:] else None))
    report.show()
    print(report.write())
