"""The view kernel against its plain reference, and its speed; the colours of views that a CPU has resized."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import product

import numpy as np
import torch
from torch import Tensor

from rob.benchmarks.gpu_check.section import NotHere, Section, poison
from rob.common.views import drawing
from rob.common.views.colours import apply_colours
from rob.common.views.drawing import LOCAL, view_parameters
from rob.common.views.planes import FACTOR_X, FACTOR_Y, HEIGHT, KIND, LAYOUT_COLUMNS, RGB, SCALE, WIDTH, YCC, Planes
from rob.common.views.recipes import get_recipe
from rob.common.views.reference import views_from_planes as reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPH = 375, 500


def run(section: Section) -> None:
    if section.device.type == "cuda" and not find_spec("triton"):
        raise NotHere("triton is not installed")
    for number, (size, kind, cubic) in enumerate(cases(section.toy)):
        if number == FIRST:  # the times, before what is left of the cases: the time may end
            section.attempt("colours", lambda: _colours(section))
            for filter_is_cubic in (False, True):
                words = f"{'bicubic' if filter_is_cubic else 'bilinear'} views from planes"
                section.measure(words, lambda c=filter_is_cubic: _speed(section, c))
            section.measure("colours of resized views", lambda: _colours_speed(section))
        words = f"{'bicubic' if cubic else 'bilinear'}, {'YCbCr' if kind == YCC else 'RGB'}, {size} px"
        section.attempt(words, lambda c=cubic, k=kind, s=size, w=words: _as_the_reference(section, c, k, s, w))


FIRST = 2
"""Cases that come before the times: a kernel that is wrong need not be timed."""


def cases(toy: bool) -> list[tuple[int, int, bool]]:
    """Size, kind of planes and whether the filter is cubic: both filters first."""
    return list(product((17,) if toy else (96, 224, 37), (YCC, RGB), (False, True)))


def on_device(device: torch.device) -> Callable[..., Tensor]:
    """The views of planes as training makes them: the kernel on CUDA, its reference elsewhere."""
    if device.type != "cuda":
        return reference
    from rob.common.views.kernel import views_from_planes

    return views_from_planes


def photographs(count: int, kind: int, height: int, width: int, recipe_name: str, cubic: bool, ids: tuple[int, ...]):
    """Smooth noise with edges as ``count`` decoded images, with the views ``ids`` that a recipe draws of them."""
    random = np.random.default_rng(0)
    factor = 2 if kind == YCC else 1
    shapes = [(height, width), *[(height // factor, width // factor)] * 2]
    planes = []
    for rows, columns in shapes:
        coarse = torch.from_numpy(random.integers(0, 256, (1, 1, rows // 8 + 2, columns // 8 + 2))).float()
        smooth = torch.nn.functional.interpolate(coarse, (rows, columns), mode="bilinear")[0, 0]
        planes.append(smooth.to(torch.uint8).flatten())
    one = torch.cat(planes)
    layout = torch.zeros(count, LAYOUT_COLUMNS, dtype=torch.int32)
    for column, value in {
        KIND: kind,
        SCALE: 1,
        HEIGHT: height,
        WIDTH: width,
        FACTOR_Y: factor,
        FACTOR_X: factor,
    }.items():
        layout[:, column] = value
    shift = torch.arange(count).mul(7).remainder(len(one))
    pixels = torch.cat([one.roll(int(by)) for by in shift])
    starts = torch.arange(count + 1) * len(one)
    sides = np.full((count, 1), height), np.full((count, 1), width)
    drawn = view_parameters(get_recipe(recipe_name), 3, np.arange(count)[:, None], np.array(ids), *sides)
    return Planes(pixels, starts, layout, *map(torch.from_numpy, drawn), cubic=cubic)


def _as_the_reference(section: Section, cubic: bool, kind: int, size: int, words: str) -> None:
    device = section.device
    height, width = (40, 52) if section.toy else (180, 240)
    planes = photographs(2 if section.toy else 6, kind, height, width, "dino", cubic, (0, 1, LOCAL, LOCAL + 1))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    colour = planes.colour[:, 1:].contiguous()
    exact = reference(planes, 1, size, colour, 0.8, mean, std, torch.float32)
    make, moved = on_device(device), planes.to(device)

    def ours(dtype: torch.dtype) -> Tensor:
        poison(device, 16 << 20)
        return make(moved, 1, size, colour, 0.8, mean.to(device), std.to(device), dtype)

    found = ours(torch.float32)
    off = (found.cpu() - exact).abs() * std.view(3, 1, 1) * 255
    section.check(f"{words}: mean error of 255", off.mean(), 0.1)
    # To either side of a threshold (solarise, the largest channel), a pixel differs by more.
    section.check(f"{words}: share of pixels off by more than half a level", (off > 0.5).float().mean(), 5e-3)
    section.check(f"{words}: twice the same", (ours(torch.float32) - found).abs().max(), 0.0)
    section.check(f"{words}: bfloat16", (ours(torch.bfloat16).float() - found).abs().max(), 0.03)


def _colours(section: Section) -> None:
    """Of views that the CPU has resized: as on the CPU."""
    device, size = section.device, section.size(16, 96, 96)
    images, colour = _resized(section.size(3, 64, 64), size, "dino")
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    exact = apply_colours(images, colour, 0.5, mean, std)
    ours = lambda: apply_colours(images.to(device), colour, 0.5, mean.to(device), std.to(device))  # noqa: E731
    poison(device, 16 << 20)
    found = ours()
    off = (found.cpu() - exact).abs() * std.view(3, 1, 1) * 255
    section.check("colours: mean error of 255", off.mean(), 0.1)
    section.check("colours: share of pixels off by more than half a level", (off > 0.5).float().mean(), 5e-3)
    section.check("colours: twice the same", (ours() - found).abs().max(), 0.0)


def _resized(count: int, size: int, recipe: str) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, size // 8 + 1, size // 8 + 1), generator=random).float()
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)
    sides = np.full((count, 1), 375), np.full((count, 1), 500)
    drawn = view_parameters(get_recipe(recipe), 0, np.arange(count)[:, None], np.array([0]), *sides)
    return images, torch.from_numpy(drawn.colour).flatten(0, 1)


# ==== time ====


def _batch(section: Section) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Images, and (number, side) of global and local views: DINO's."""
    return section.size((2, (1, 16), (1, 8)), (256, (2, 224), (10, 96)), (256, (2, 224), (10, 96)))


def _colours_speed(section: Section) -> dict[str, object]:
    device = section.device
    images, *crops = _batch(section)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    batches = [_resized(images * count, size, "dino") for count, size in crops]
    moved = [(pixels.to(device), colour) for pixels, colour in batches]
    seconds = section.seconds_of(lambda: [apply_colours(p, c, 0.5, mean, std) for p, c in moved], 5, 2)
    moved_bytes = sum(p.numel() * (1 + 4) for p, _ in moved)
    return {"images": images, "ms": seconds * 1e3, "gb_per_second": moved_bytes / seconds / 1e9}


def _speed(section: Section, cubic: bool) -> dict[str, object]:
    device = section.device
    images, (globals_, large), (locals_, small) = _batch(section)
    ids = (*range(globals_), *range(LOCAL, LOCAL + locals_))
    height, width = (40, 52) if section.toy else PHOTOGRAPH
    planes = photographs(images, YCC, height, width, "dino", cubic, ids).to(device)
    colour = planes.colour.cpu()
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    make = on_device(device)

    def views() -> None:
        make(planes, 0, large, colour[:, :globals_], 1.0, mean, std, torch.bfloat16)
        make(planes, globals_, small, colour[:, globals_:], 1.0, mean, std, torch.bfloat16)

    seconds = section.seconds_of(views, 5, 3)
    pixels = images * 3 * (globals_ * large**2 + locals_ * small**2)
    area = (planes.geometry[..., drawing.CROP_HEIGHT] * planes.geometry[..., drawing.CROP_WIDTH]).sum().item() * 1.5
    return {
        "images": images,
        "ms": seconds * 1e3,
        "gb_per_second": (2 * pixels + area) / seconds / 1e9,
        "device_ms": section.device_seconds_of(views, 5, 1) * 1e3,
    }
