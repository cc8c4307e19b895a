"""Colours, blur and normalisation of views that a CPU has resized, on a GPU, in Triton."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import drawing
from .kernel_blur import blur
from .kernel_formulas import channels_last, coloured, finish, orders_on, places_of
from .planes import moved

BLOCK, WARPS = 1024, 4
"""Pixels of a resized view that one program makes, and its warps."""


_CONTRAST = tl.constexpr(drawing.CONTRAST)
_COLOUR_COLUMNS = tl.constexpr(drawing.COLOUR_COLUMNS)


def apply_colours_triton(
    images: Tensor, colour: Tensor, blur_scale: float, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What ``colours.apply_colours`` says, for images on a CUDA device. Waits for nothing."""
    num_views, _, size, _ = images.shape
    images, device, tiles = images.contiguous(), images.device, triton.cdiv(size * size, BLOCK)
    out = channels_last(num_views, size, dtype, device)
    places, blurred = places_of(colour[:, drawing.SIGMA], device)
    kept = torch.empty(blurred, 3, size, size, dtype=torch.float16, device=device)
    sums = torch.empty(num_views, tiles, dtype=torch.float32, device=device)
    parameters = moved(colour.contiguous(), device)

    def launch(measure: bool) -> None:
        colours_kernel[(num_views * tiles,)](
            images, parameters, orders_on(device), places, mean, std, sums, kept, out, size * size,
            MEASURE=measure, TILES=triton.next_power_of_2(tiles), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip

    if num_views:
        if (colour[:, drawing.CONTRAST] != 1).any():
            launch(measure=True)
        launch(measure=False)
    if blurred:
        blur(parameters, places, mean, std, kept, out.unsqueeze(1), blur_scale, 1, 0)
    return out


# --- the kernel of resized views: a program makes BLOCK pixels of one ---


@triton.jit
def colours_kernel(
    images,  # (N, 3, area) uint8
    colour,  # (N, 8) float32
    orders,
    places,  # (N,) int32
    mean,  # (3,) float32
    std,  # (3,) float32
    sums,  # (N, tiles) float32
    kept,  # (views to be blurred, 3, area) float16
    out,  # (N, area, 3)
    area,
    MEASURE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = tl.cdiv(area, BLOCK)
    view = program // tiles
    colour += view * _COLOUR_COLUMNS
    contrast = tl.load(colour + _CONTRAST)
    if MEASURE and contrast == 1.0:
        return
    pixel = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < area
    images += view.to(tl.int64) * 3 * area
    r = tl.load(images + pixel, inside, 0).to(tl.float32) * (1 / 255)
    g = tl.load(images + area + pixel, inside, 0).to(tl.float32) * (1 / 255)
    b = tl.load(images + 2 * area + pixel, inside, 0).to(tl.float32) * (1 / 255)
    r, g, b = coloured(r, g, b, colour, orders, sums, program, view, tiles, inside, area, MEASURE, TILES)
    if not MEASURE:
        finish(r, g, b, colour, places, mean, std, kept, out, view, pixel, inside, area)
