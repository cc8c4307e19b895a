"""What the loader is measured against: ffcv with a pipeline a view, torchvision in a DataLoader, and bare loops on threads.

Each side is a function that makes the same views of every image once and returns how many images that were.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rob.common.images.beton import Beton
from rob.common.views.drawing import LOCAL, view_parameters
from rob.common.views.loader import ViewSet
from rob.common.views.recipes import RecipeOverrides, get_recipe

VIEWS = (ViewSet((0, 1), 224), ViewSet(tuple(LOCAL + i for i in range(6)), 96))
VIEW_IDS = np.array([i for s in VIEWS for i in s.ids])
SIZES = [s.size for s in VIEWS for _ in s.ids]
RECIPES = {name: get_recipe("dino", RecipeOverrides(interpolation=name)) for name in ("bilinear", "bicubic")}
"""One for each filter, of the same crops; the recipe's own is bicubic."""
SEED = 0


def geometry_of(data: Beton) -> np.ndarray:
    """(images, 8, 5): the crops that every side makes."""
    ids = np.arange(data.num_images)[:, None]
    return view_parameters(
        RECIPES["bicubic"], SEED, ids, VIEW_IDS, data.heights[:, None], data.widths[:, None]
    ).geometry


# --- frameworks ---


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

        decode.is_parallel = True  # type: ignore[attr-defined] (ffcv asks for it)
        return decode


def ffcv_side(data: Beton, batch_size: int, threads: int) -> Callable[[], int]:
    geometry = geometry_of(data).astype(np.int64)
    pipelines: Any = {"image": None, "label": None} | {
        f"view{v}": PipelineSpec("image", TabledCrop(size, np.ascontiguousarray(geometry[:, v, :4])))
        for v, size in enumerate(SIZES)
    }
    loader = Loader(
        str(data.path),
        batch_size,
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
    filter: v2.InterpolationMode

    def __len__(self) -> int:
        return self.data.num_images

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image: Any = Image.open(io.BytesIO(self.data.encoded(i).tobytes())).convert("RGB")
        views = []
        for (top, left, height, width, _), size in zip(self.geometry[i].tolist(), SIZES, strict=True):
            view = v2.functional.resized_crop(image, top, left, height, width, [size, size], self.filter)
            views.append(v2.functional.pil_to_tensor(view))
        return views


def torchvision_side(data: Beton, batch_size: int, threads: int, filter: v2.InterpolationMode) -> Callable[[], int]:
    dataset = PillowViews(data, geometry_of(data), filter)
    loader = DataLoader(dataset, batch_size, num_workers=threads, persistent_workers=True)
    return lambda: sum(len(views[0]) for views in loader)


# --- bare loops on threads ---

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


def resize_with_torchvision(pixels: np.ndarray, crops: list[list[int]], filter: v2.InterpolationMode) -> None:
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # channels-last, as its fast path wants it
    for (top, left, height, width, _), size in zip(crops, SIZES, strict=True):
        v2.functional.resized_crop(image, top, left, height, width, [size, size], filter, antialias=True)
