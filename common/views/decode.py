"""The images of a ``.beton`` to planes of bytes, compiled: what is done once an image, however many views it has.

A JPEG is decoded to its own YCbCr planes: colour is then converted at the size of a view, and subsampled chroma is
resampled as it is stored, which halves the work of resizing. When every view of an image is much smaller than its crop,
the inverse DCT makes the image at half, a quarter or an eighth of its size directly. libjpeg-turbo is the one that ffcv
links; importing this module needs ffcv.

numba's cache on disk notices changes in a function's own file only. So no compiled function here calls one of another
file.
"""

import ctypes
import threading
from weakref import finalize

import llvmlite.binding
import numpy as np
from numba import njit, types

from ..images.beton import RAW
from .drawing import CROP_HEIGHT, CROP_WIDTH
from .ffcv_import import library
from .planes import FACTOR_X, FACTOR_Y, HEIGHT, KIND, RGB, SCALE, SLACK, UNDECODED, WIDTH, YCC

MARGIN = 3
"""A triangle filter lets some detail finer than a view's pixels through, which a smaller decode has lost, and chroma is
stored at half the size. The worst view of photographs (qualities 75 and 90, every subsampling, views of 12 to 96 px) was
31 dB from Pillow's with a margin of 1, 37 dB with 2, 38.8 dB with 3.
"""

_lib = ctypes.CDLL(library.__file__)
for _name in ("tjDecompressHeader3", "tjDecompressToYUVPlanes"):
    # By symbol name rather than by address, so that the compiled code can be cached on disk.
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_lib, _name), ctypes.c_void_p).value)
_lib.tjInitDecompress.restype = ctypes.c_void_p
_lib.tjDestroy.argtypes = (ctypes.c_void_p,)

_int, _ptr = types.int32, types.uintp
_decompress_header = types.ExternalFunction(
    "tjDecompressHeader3", _int(_ptr, _ptr, types.uint64, _ptr, _ptr, _ptr, _ptr)
)
_decompress_planes = types.ExternalFunction(
    "tjDecompressToYUVPlanes", _int(_ptr, _ptr, types.uint64, _ptr, _int, _ptr, _int, _int)
)

_thread = threading.local()


class _Decompressor:
    """One of libjpeg-turbo's. It goes with the thread that has it, but not at the end of the process, when some still decode."""

    def __init__(self) -> None:
        self.handle: int = _lib.tjInitDecompress()
        finalize(self, _lib.tjDestroy, self.handle).atexit = False


def decoder_handle() -> int:
    """This thread's libjpeg-turbo decompressor: handles are not shared between threads."""
    if not hasattr(_thread, "decompressor"):
        _thread.decompressor = _Decompressor()
    return _thread.decompressor.handle


def plane_starts(heights: np.ndarray, widths: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(n + 1,) int64: where each image's planes begin when they lie one behind another, decoded at 1/scale; then the end."""
    padding = 3  # libjpeg-turbo rounds the first plane up to whole chroma samples, of at most four pixels
    height, width = -(-heights.astype(np.int64) // scales) + padding, -(-widths.astype(np.int64) // scales) + padding
    return np.concatenate([[0], np.cumsum(3 * height * width + SLACK)])


def decode_scales(geometry: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(B,) int64: the largest of 8, 4, 2, 1 at whose inverse every crop of an image is still MARGIN times the size of its
    view.

    geometry: (B, V, 5) of ViewParameters. sizes: (V,) sides of the views in pixels.
    """
    crops = np.minimum(geometry[..., CROP_HEIGHT], geometry[..., CROP_WIDTH])
    excess = (crops // (MARGIN * sizes)).min(axis=1)
    return np.select([excess >= 8, excess >= 4, excess >= 2], [8, 4, 2], 1)


@njit(cache=True, nogil=True)
def decode_planes(handle, memory, pointers, lengths, modes, heights, widths, image_ids, scales, starts, planes, layout):
    """Decode n images of a ``.beton``, each at 1/scale (uncompressed ones at full size), into its planes.

    memory: the whole file; pointers, lengths, modes, heights, widths: its index by image id (``Beton``). image_ids,
    scales: (n,) int64; starts: ``plane_starts``. Fills ``planes`` (bytes,) uint8 and ``layout`` (n, 6) int32. Where
    libjpeg-turbo has a complaint, KIND is UNDECODED: it may be harmless (stray bytes between markers) and is Pillow's
    to judge.
    """
    for i in range(len(image_ids)):
        image = image_ids[i]
        height, width = np.int64(heights[image]), np.int64(widths[image])
        data = memory[pointers[image] : pointers[image] + lengths[image]]
        if modes[image] == RAW:
            _split(data, height, width, planes[starts[i] : starts[i + 1]], layout[i])
        else:
            _decode_jpeg(handle, data, height, width, scales[i], planes[starts[i] : starts[i + 1]], layout[i])


@njit(cache=True, nogil=True)
def split_pixels(pixels, planes, layout):
    """Lay (H, W, 3) uint8 RGB pixels out as an image's part of ``planes`` and row of ``layout``."""
    _split(pixels.ravel(), pixels.shape[0], pixels.shape[1], planes, layout)


@njit(cache=True, nogil=True)
def _split(data, height, width, planes, layout):
    layout[KIND], layout[SCALE], layout[HEIGHT], layout[WIDTH] = RGB, 1, height, width
    layout[FACTOR_Y], layout[FACTOR_X] = 1, 1
    pixels = height * width
    red, green, blue = planes[:pixels], planes[pixels : 2 * pixels], planes[2 * pixels : 3 * pixels]
    for i in range(pixels):
        red[i], green[i], blue[i] = data[3 * i], data[3 * i + 1], data[3 * i + 2]


@njit(cache=True, nogil=True)
def _decode_jpeg(handle, data, height, width, scale, planes, layout):
    layout[KIND] = UNDECODED
    header = np.zeros(4, np.int32)  # width, height, subsampling, colour space (1 is YCbCr)
    at = header.ctypes.data
    if _decompress_header(handle, data.ctypes.data, data.size, at, at + 4, at + 8, at + 12) != 0:
        return
    factor_y, factor_x = _chroma_factors(header[2])
    if header[0] != width or header[1] != height or header[3] != 1 or factor_x == 0:
        return
    height, width = (height + scale - 1) // scale, (width + scale - 1) // scale
    chroma_height, chroma_width = (height + factor_y - 1) // factor_y, (width + factor_x - 1) // factor_x
    stride = chroma_width * factor_x
    luma_size, chroma_size = chroma_height * factor_y * stride, chroma_height * chroma_width
    base = planes.ctypes.data
    pointers = np.array([base, base + luma_size, base + luma_size + chroma_size], np.uintp)
    strides = np.array([stride, chroma_width, chroma_width], np.int32)
    if _decompress_planes(
        handle, data.ctypes.data, data.size, pointers.ctypes.data, width, strides.ctypes.data, height, 0
    ):
        return
    layout[KIND], layout[SCALE], layout[HEIGHT], layout[WIDTH] = YCC, scale, chroma_height * factor_y, stride
    layout[FACTOR_Y], layout[FACTOR_X] = factor_y, factor_x


@njit(cache=True, nogil=True)
def _chroma_factors(subsampling):
    """Luma rows and columns a chroma sample, by libjpeg-turbo's TJSAMP number; (0, 0) for a grey image or an unknown
    layout."""
    if subsampling == 0:
        return 1, 1
    if subsampling == 1:
        return 1, 2
    if subsampling == 2:
        return 2, 2
    if subsampling == 4:
        return 2, 1
    if subsampling == 5:
        return 1, 4
    return 0, 0
