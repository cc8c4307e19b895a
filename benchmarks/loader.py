"""Images to views, against its peers and its floor: the same photographs, the same crops, in one run.

    rob bench loader

500 x 375 JPEGs (quality 90) to 2 views of 224 and 6 of 96 pixels, geometry only, on all cores. The sides take turns, round by
round, so that the machine's noise falls on all alike; the first round warms up (ffcv compiles in it). Our views must be within
38 dB of Pillow's before the times count. The peers need not flip, ours do.

Where there is a GPU, more rows: views made on it, against decoding alone, and the view kernel alone against a copy, counted in
bytes read and written. Without one the report says so; these rows have not been run yet.
"""

import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rob.benchmarks.report import Report
from rob.common.augment import augment
from rob.common.beton import Beton
from rob.common.decode import FACTOR_X, FACTOR_Y, SCALE, decode_planes, decoder_handle, plane_starts
from rob.common.images import PackConfig, pack
from rob.common.loader import Batch, LoaderConfig, ViewLoader, ViewSet
from rob.common.pillow_path import render_view
from rob.common.views import LOCAL, RecipeOverrides, get_recipe, view_parameters

HEIGHT, WIDTH = 375, 500
VIEWS = (ViewSet((0, 1), 224), ViewSet(tuple(LOCAL + i for i in range(6)), 96))
VIEW_IDS = np.array([i for s in VIEWS for i in s.ids])
SIZES = [s.size for s in VIEWS for _ in s.ids]
RECIPE, SEED = get_recipe("dino"), 0
PLAIN = RecipeOverrides(colour=0.0, grey=0.0, blur=0.0, solarise=0.0)
CIFAR10 = Path(__file__).parents[1] / "../shared/data/cifar10-jpeg.tar.xz"
"""60,000 JPEGs of 32 x 32, for the rows that show a flat cost; left out where it is missing."""


@dataclass(frozen=True)
class LoaderBenchConfig:
    images: int = 768
    rounds: int = 5
    """Each side's median is over so many, after one that warms up."""
    batch_size: int = 64
    psnr_images: int = 96
    """How many images' views are compared with Pillow's."""


def run(config: LoaderBenchConfig) -> Report:
    """Raises AssertionError when our views differ from Pillow's by more than 38 dB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder / "photographs", config.images)
        pack(PackConfig(str(folder / "photographs"), folder / "data.beton"))
        data = Beton(folder / "data.beton")
        worst = worst_psnr(data, config)
        assert worst > 38, f"a view is only within {worst:.1f} dB of Pillow's"
        rows = compare(data, config)
        of_copy = kernel_rows(data, config, rows) if torch.cuda.is_available() else None
        if CIFAR10.exists():
            rows += linear_cost(folder)
    speed = {row["side"]: row["images_per_second"] for row in rows if "images_per_second" in row}
    best_resize = max(speed["one decode, cv2 INTER_AREA"], speed["one decode, torchvision uint8"])
    ratios = {
        "vs_ffcv_per_view": speed["rob"] / speed["ffcv, one pipeline a view"],
        "vs_torchvision": speed["rob"] / speed["torchvision v2, PIL, DataLoader"],
        "vs_best_resize": speed["rob"] / best_resize,
        "of_decode_only": speed["rob"] / speed["decode only, planes"],
        "gpu_of_decode_only": speed["rob, views on the GPU"] / speed["decode only, planes"] if of_copy else None,
        "kernel_of_copy_bandwidth": of_copy,
    }
    work = {
        "images": f"{config.images} JPEGs of {WIDTH} x {HEIGHT}, quality 90",
        "views": "2 x 224 + 6 x 96",
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "worst_psnr_against_pillow": worst,
        "gpu": torch.cuda.get_device_name() if of_copy else "none: views on a GPU are not measured",
    }
    return Report.of("loader", torch.device("cpu"), work, rows, ratios)


def make_photographs(folder: Path, count: int) -> None:
    """Cut and varied from the sample photographs of scikit-learn and, where it is installed, of scikit-image."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    try:
        from skimage import data  # pyright: ignore[reportMissingImports]  # only this benchmark needs it

        originals += [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    except ImportError:
        pass
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        original = originals[i % len(originals)]
        width = int(original.width * random.uniform(0.6, 1))
        height = min(original.height, width * HEIGHT // WIDTH)
        left = int(random.integers(0, original.width - width + 1))
        top = int(random.integers(0, original.height - height + 1))
        cut = original.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        cut = ImageEnhance.Brightness(cut).enhance(random.uniform(0.7, 1.2))
        cut.save(folder / f"{i:05}.jpg", quality=90)


def geometry_of(data: Beton) -> np.ndarray:
    """(images, 8, 5): the crops that every side makes."""
    ids = np.arange(data.num_images)[:, None]
    return view_parameters(RECIPE, SEED, ids, VIEW_IDS, data.heights[:, None], data.widths[:, None]).geometry


def worst_psnr(data: Beton, config: LoaderBenchConfig) -> float:
    geometry, worst = geometry_of(data), np.inf
    loader = ViewLoader(data, RECIPE, SEED, LoaderConfig("ffcv", config.batch_size))
    for batch in loader.epoch(np.arange(min(config.psnr_images, data.num_images)), VIEWS):
        for b, i in enumerate(batch.image_ids):
            image, views = Image.fromarray(data.image(i)), [view for s in batch.views for view in s[b]]
            for view, crop, size in zip(views, geometry[i].tolist(), SIZES, strict=True):
                error = view.permute(1, 2, 0).numpy().astype(float) - render_view(image, crop, size)
                worst = min(worst, 10 * np.log10(255**2 / max(1e-9, np.mean(error**2))))
    return float(worst)


def compare(data: Beton, config: LoaderBenchConfig) -> list[dict[str, Any]]:
    threads = LoaderConfig().threads
    sides: dict[str, Callable[[], int]] = {
        "rob": rob_side(data, config),
        "rob, with DINO's colours": rob_side(data, config, colours=True),
        "ffcv, one pipeline a view": ffcv_side(data, config, threads),
        "torchvision v2, PIL, DataLoader": torchvision_side(data, config, threads),
        "one decode, cv2 INTER_AREA": loop_side(data, threads, resize_with_cv2),
        "one decode, torchvision uint8": loop_side(data, threads, resize_with_torchvision),
        "decode only, RGB": loop_side(data, threads, None),
        "decode only, planes": planes_side(data, threads),
    }
    if torch.cuda.is_available():
        sides["rob, views on the GPU"] = gpu_side(data, config)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + config.rounds):
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
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        user, system = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(") ", 1)[1].split()[11:13]
        seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


# --- ours ---


def rob_side(data: Beton, config: LoaderBenchConfig, colours: bool = False) -> Callable[[], int]:
    loader = ViewLoader(data, RECIPE, SEED, LoaderConfig("ffcv", config.batch_size))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def epoch() -> int:
        done = 0
        for batch in loader.epoch(np.arange(data.num_images), VIEWS):
            done += len(batch.image_ids)
            if colours:
                for views, colour in zip(batch.views, batch.colour, strict=True):
                    augment(views.flatten(0, 1), colour.flatten(0, 1), 1.0, mean, std)
        return done

    return epoch


def planes_side(data: Beton, threads: int) -> Callable[[], int]:
    """Our decoding alone: YCbCr planes, no view."""
    scratch = {}

    def decode(ids: np.ndarray) -> int:
        handle, scales = decoder_handle(), np.ones(len(ids), np.int64)
        starts = plane_starts(data.heights[ids], data.widths[ids], scales)
        planes = scratch.setdefault(handle, np.empty(starts[-1], np.uint8))
        layout = np.empty((len(ids), 6), np.int32)
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
    read = (geometry[..., 2] * geometry[..., 3] * (plane_bytes / layout[:, SCALE] ** 2)[:, None]).sum()
    written = len(batch.image_ids) * sum(3 * 2 * size**2 for size in SIZES)
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def render() -> None:
        for number in range(len(VIEWS)):
            batch.augment(number, 1.0, mean, std, torch.bfloat16)

    speeds = {}
    for side, work, count in (
        ("view kernel alone", render, float(read) + written),
        ("copy on the GPU", lambda: target.copy_(source), 2.0 * source.numel()),
    ):
        milliseconds: Any = do_bench(work, return_mode="median")
        speeds[side] = count / (1e-3 * milliseconds)
        rows.append({"side": side, "gigabytes_per_second": speeds[side] / 1e9})
    return speeds["view kernel alone"] / speeds["copy on the GPU"]


# --- peers: frameworks ---


class TabledCrop(RandomResizedCropRGBImageDecoder):
    """ffcv's RandomResizedCrop decoder, with crops from a table in place of its own, which it cannot repeat."""

    def __init__(self, size: int, crops: np.ndarray) -> None:
        super().__init__((size, size))
        self.crops = crops

    def generate_code(self):
        crops, jpg = self.crops, IMAGE_MODES["jpg"]
        mem_read: Any = self.memory_read
        my_range: Any = Compiler.get_iterator()
        imdecode_c, resize_crop_c = Compiler.compile(imdecode), Compiler.compile(resize_crop)

        def decode(batch_indices, my_storage, metadata, storage_state):
            destination, temp_storage = my_storage
            for dst_ix in my_range(len(batch_indices)):
                source_ix = batch_indices[dst_ix]
                field = metadata[source_ix]
                image_data = mem_read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                if field["mode"] == jpg:
                    temp_buffer = temp_storage[dst_ix]
                    imdecode_c(image_data, temp_buffer, height, width, height, width, 0, 0, 1, 1, False, False)
                    temp_buffer = temp_buffer.reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                else:
                    temp_buffer = image_data.reshape(height, width, 3)
                i, j, h, w = crops[source_ix]
                resize_crop_c(temp_buffer, i, i + h, j, j + w, destination[dst_ix])
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


def ffcv_side(data: Beton, config: LoaderBenchConfig, threads: int) -> Callable[[], int]:
    geometry = geometry_of(data).astype(np.int64)
    pipelines: Any = {"image": None, "label": None} | {
        f"view{v}": PipelineSpec("image", TabledCrop(size, np.ascontiguousarray(geometry[:, v, :4])))
        for v, size in enumerate(SIZES)
    }
    loader = Loader(
        str(data.path),
        config.batch_size,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        pipelines=pipelines,
        drop_last=False,
    )
    return lambda: sum(len(views[0]) for views in loader)


@dataclass(frozen=True)
class PillowViews(Dataset):
    data: Beton
    geometry: np.ndarray

    def __len__(self) -> int:
        return self.data.num_images

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image: Any = Image.open(io.BytesIO(self.data.encoded(i).tobytes())).convert("RGB")
        views = []
        for (top, left, height, width, _), size in zip(self.geometry[i].tolist(), SIZES, strict=True):
            view = v2.functional.resized_crop(image, top, left, height, width, [size, size])
            views.append(v2.functional.pil_to_tensor(view))
        return views


def torchvision_side(data: Beton, config: LoaderBenchConfig, threads: int) -> Callable[[], int]:
    dataset = PillowViews(data, geometry_of(data))
    loader = DataLoader(dataset, config.batch_size, num_workers=threads, persistent_workers=True)
    return lambda: sum(len(views[0]) for views in loader)


# --- peers: bare loops on threads ---

Resize = Callable[[np.ndarray, list[list[int]]], None]


def loop_side(data: Beton, threads: int, resize: Resize | None) -> Callable[[], int]:
    """Decode each image once with ffcv's own decoder, then make its views."""
    crops, pool = geometry_of(data).tolist(), ThreadPoolExecutor(threads)

    def one(i: int) -> int:
        height, width = int(data.heights[i]), int(data.widths[i])
        pixels = np.empty((height, width, 3), np.uint8)
        imdecode(data.encoded(i), pixels, height, width, height, width, 0, 0, 1, 1, False, False)
        if resize is not None:
            resize(pixels, crops[i])
        return 1

    def all_images() -> int:
        before = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)  # the images are spread over the threads, not the pixels
        cv2.setNumThreads(1)
        try:
            return sum(pool.map(one, range(data.num_images)))
        finally:
            torch.set_num_threads(before[0])
            cv2.setNumThreads(before[1])

    return all_images


def resize_with_cv2(pixels: np.ndarray, crops: list[list[int]]) -> None:
    for (top, left, height, width, _), size in zip(crops, SIZES, strict=True):
        cv2.resize(pixels[top : top + height, left : left + width], (size, size), interpolation=cv2.INTER_AREA)


def resize_with_torchvision(pixels: np.ndarray, crops: list[list[int]]) -> None:
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # channels-last, as its fast path wants it
    for (top, left, height, width, _), size in zip(crops, SIZES, strict=True):
        v2.functional.resized_crop(image, top, left, height, width, [size, size], antialias=True)


# --- cost against the number of images ---


def linear_cost(folder: Path) -> list[dict[str, Any]]:
    """Epochs in random order over 2,000, 10,000 and 60,000 images of CIFAR-10, two views of 32 pixels."""
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(folder / "cifar10", filter="data")
    rows, sets = [], [ViewSet((0, 1), 32)]
    for count in (2_000, 10_000, 60_000):
        path = folder / f"cifar{count}.beton"
        pack(PackConfig(str(folder / "cifar10"), path, limit=count))
        loader, order = ViewLoader(Beton(path), RECIPE, SEED, LoaderConfig("ffcv", 256)), np.random.default_rng(0)
        speeds = []
        for _ in range(4):
            start, done = time.perf_counter(), 0
            while done < 10_000:
                done += sum(len(batch.image_ids) for batch in loader.epoch(order.permutation(count), sets))
            speeds.append(done / (time.perf_counter() - start))
        rows.append(
            {"side": f"rob, CIFAR-10, {count:,} images", "images": count, "images_per_second": median(speeds[1:])}
        )
    return rows


if __name__ == "__main__":
    report = run(LoaderBenchConfig())
    report.show()
    print(report.write())
