"""One image in, all of its views out, compiled: decode the JPEG once, crop and resize every view from the same planes.

The JPEG is decoded to its own YCbCr planes: colour is converted at the size of the view, and subsampled chroma is resampled as it
is stored, which halves the work of resizing. When every view of an image is at least 2, 4 or 8 times smaller than its crop, the
inverse DCT makes the smaller image directly. libjpeg-turbo is the one that ffcv links; importing this module needs ffcv.
"""

import ctypes
import threading

import ffcv._libffcv
import llvmlite.binding
import numpy as np
from numba import njit, types

from .resample import crop_resize
from .views import draw_view

GEOMETRY = "planes"
"""Name of this resize path in a store's manifest."""

JPEG, RAW = 0, 1
"""Values of ffcv's image mode field."""

_lib = ctypes.CDLL(ffcv._libffcv.__file__)
for _name in ("tjDecompressHeader3", "tjDecompressToYUVPlanes"):
    # By symbol name rather than by address, so that the compiled code can be cached on disk.
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_lib, _name), ctypes.c_void_p).value)
_lib.tjInitDecompress.restype = ctypes.c_void_p

_int, _ptr = types.int32, types.uintp
_decompress_header = types.ExternalFunction("tjDecompressHeader3", _int(_ptr, _ptr, types.uint64, _ptr, _ptr, _ptr, _ptr))
_decompress_planes = types.ExternalFunction(
    "tjDecompressToYUVPlanes", _int(_ptr, _ptr, types.uint64, _ptr, _int, _ptr, _int, _int)
)

_thread = threading.local()


def decoder_handle() -> int:
    """This thread's libjpeg-turbo decompressor: handles are not shared between threads, and live as long as the thread."""
    if not hasattr(_thread, "handle"):
        _thread.handle = _lib.tjInitDecompress()
    return _thread.handle


@njit(cache=True, nogil=True)
def _chroma_factors(subsampling):
    """Horizontal and vertical luma pixels a chroma pixel, by libjpeg-turbo's TJSAMP number; (0, 0) is a grey image."""
    if subsampling == 0:
        return 1, 1
    if subsampling == 1:
        return 2, 1
    if subsampling == 2:
        return 2, 2
    if subsampling == 4:
        return 1, 2
    if subsampling == 5:
        return 4, 1
    if subsampling == 6:
        return 1, 4
    return 0, 0


@njit(cache=True, nogil=True)
def _to_rgb(luma, blue, red, out):
    """JFIF's full-range YCbCr planes (S, S) to ``out`` (3, S, S), in 16-bit fixed point."""
    y_, cb_, cr_ = luma.ravel(), blue.ravel(), red.ravel()
    r_, g_, b_ = out[0].ravel(), out[1].ravel(), out[2].ravel()
    for i in range(y_.size):
        y = np.int32(y_[i]) << np.int32(14)
        cb, cr = np.int32(cb_[i]) - np.int32(128), np.int32(cr_[i]) - np.int32(128)
        r = (y + np.int32(22970) * cr + np.int32(8192)) >> np.int32(14)
        g = (y - np.int32(5638) * cb - np.int32(11700) * cr + np.int32(8192)) >> np.int32(14)
        b = (y + np.int32(29032) * cb + np.int32(8192)) >> np.int32(14)
        r_[i] = np.uint8(min(max(r, np.int32(0)), np.int32(255)))
        g_[i] = np.uint8(min(max(g, np.int32(0)), np.int32(255)))
        b_[i] = np.uint8(min(max(b, np.int32(0)), np.int32(255)))


@njit(cache=True, nogil=True)
def _views_of_raw(pixels, geometry, sizes, offsets, out):
    """Views of an uncompressed (H, W, 3) image: split it into planes, then resize each."""
    height, width = pixels.shape[0], pixels.shape[1]
    planes = np.empty((3, height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            for c in range(3):
                planes[c, y, x] = pixels[y, x, c]
    for v in range(len(sizes)):
        size = sizes[v]
        view = out[offsets[v] : offsets[v] + 3 * size * size].reshape(3, size, size)
        top, left, h, w, flip = geometry[v]
        for c in range(3):
            crop_resize(planes[c], float(top), float(left), float(h), float(w), size, flip == 1, view[c])


@njit(cache=True, nogil=True)
def _decode_scale(geometry, sizes):
    """The largest of 8, 4, 2, 1 by which every view's crop exceeds its output."""
    for scale in (8, 4, 2):
        fits = True
        for v in range(len(sizes)):
            fits = fits and min(geometry[v, 2], geometry[v, 3]) >= scale * sizes[v]
        if fits:
            return scale
    return 1


@njit(cache=True, nogil=True)
def _views_of_jpeg(handle, data, height, width, geometry, sizes, offsets, scratch, out):
    """Views of a JPEG; returns False when libjpeg-turbo cannot decode it."""
    header = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = header.ctypes.data
    if _decompress_header(handle, data.ctypes.data, data.size, at, at + 4, at + 8, at + 12) != 0:
        return False
    if header[0] != width or header[1] != height:
        return False
    factor_x, factor_y = _chroma_factors(header[2])
    scale = _decode_scale(geometry, sizes)
    w, h = (width + scale - 1) // scale, (height + scale - 1) // scale
    grey = factor_x == 0
    chroma_w, chroma_h = (0, 0) if grey else ((w + factor_x - 1) // factor_x, (h + factor_y - 1) // factor_y)
    luma_w, luma_h = (w, h) if grey else (chroma_w * factor_x, chroma_h * factor_y)
    luma_size, chroma_size = luma_w * luma_h, chroma_w * chroma_h
    luma = scratch[:luma_size].reshape(luma_h, luma_w)
    pointers = np.empty(3, np.uintp)
    strides = np.array([luma_w, chroma_w, chroma_w], np.int32)
    base = scratch.ctypes.data
    pointers[0], pointers[1], pointers[2] = base, base + luma_size, base + luma_size + chroma_size
    if _decompress_planes(handle, data.ctypes.data, data.size, pointers.ctypes.data, w, strides.ctypes.data, h, 0) != 0:
        return False
    blue = scratch[luma_size : luma_size + chroma_size].reshape(chroma_h, chroma_w)
    red = scratch[luma_size + chroma_size : luma_size + 2 * chroma_size].reshape(chroma_h, chroma_w)
    for v in range(len(sizes)):
        size = sizes[v]
        view = out[offsets[v] : offsets[v] + 3 * size * size].reshape(3, size, size)
        flip = geometry[v, 4] == 1
        top, left = geometry[v, 0] / scale, geometry[v, 1] / scale
        box_h, box_w = geometry[v, 2] / scale, geometry[v, 3] / scale
        if grey:
            crop_resize(luma, top, left, box_h, box_w, size, flip, view[0])
            view[1], view[2] = view[0], view[0]
        else:
            ycc = np.empty((3, size, size), np.uint8)
            cy, cx = float(factor_y), float(factor_x)
            crop_resize(luma, top, left, box_h, box_w, size, flip, ycc[0])
            crop_resize(blue, top / cy, left / cx, box_h / cy, box_w / cx, size, flip, ycc[1])
            crop_resize(red, top / cy, left / cx, box_h / cy, box_w / cx, size, flip, ycc[2])
            _to_rgb(ycc[0], ycc[1], ycc[2], view)
    return True


@njit(cache=True, nogil=True)
def render_views(
    handle, memory, pointers, lengths, modes, heights, widths, image_ids, table, kinds, seed, view_ids, sizes, offsets, out, colour
):
    """Draw and render every view of the given images.

    ``memory`` is the whole ``.beton``; ``pointers``, ``lengths``, ``modes``, ``heights`` and ``widths`` are its index by image id.
    ``view_ids``, ``sizes`` and ``offsets`` have one entry a view. Fills ``out`` (B, bytes of all views) uint8, where the view v of
    side S lies at ``offsets[v]`` as (3, x, y), and ``colour`` (B, views, 8) float32. Returns the first image id that could not
    be decoded, or -1.
    """
    geometry = np.empty((len(view_ids), 5), np.int32)
    largest = 0
    for i in image_ids:
        largest = max(largest, (int(heights[i]) + 4) * (int(widths[i]) + 4))
    scratch = np.empty(3 * largest, np.uint8)
    for b in range(len(image_ids)):
        i = image_ids[b]
        height, width = int(heights[i]), int(widths[i])
        for v in range(len(view_ids)):
            draw_view(table, kinds, seed, i, view_ids[v], height, width, geometry[v], colour[b, v])
        data = memory[pointers[i] : pointers[i] + lengths[i]]
        if modes[i] == RAW:
            _views_of_raw(data.reshape(height, width, 3), geometry, sizes, offsets, out[b])
        elif not _views_of_jpeg(handle, data, height, width, geometry, sizes, offsets, scratch, out[b]):
            return i
    return -1
